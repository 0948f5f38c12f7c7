"""Files of corrected labels: what they change, what is refused, and that a resumed run keeps to
them."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tests.support.photo_folders import write_images, write_tree

from training.data.labels import apply_labels, name_in_labels, read_labels
from training.data.manifest import data_of_run, fingerprint, what_is_new, write_manifest
from training.data.splits import FoodData, load_food_data
from training.errors import DataError

NAME_LETTERS = "ab .é日=-\"',\\"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "photos", {"dal": 12, "naan": 12, "pho": 12})


def labels_file(folder: Path, *rows: str) -> Path:
    file = folder / "labels.csv"
    file.write_text("\n".join(["path,label", *rows, ""]), encoding="utf-8")
    return file


def label_of(data: FoodData) -> dict[str, tuple[str, str]]:
    """Split and class of each photo, by folder and name."""
    return {
        "/".join(Path(path).parts[-2:]): (name, data.classes[label])
        for name, split in (("train", data.train), ("val", data.val), ("test", data.test))
        for path, label in zip(split.paths, split.labels.tolist(), strict=True)
    }


def test_photos_change_their_label_or_go_and_stay_in_their_split(
    photos: Path, tmp_path: Path
) -> None:
    before = label_of(load_food_data(photos))
    rows = ("dal/0000.jpg,Naan", "./naan/0001.jpg,drop", "naan/0002.jpg,", "pho/0003.jpg,pho")
    data = load_food_data(photos, labels=labels_file(tmp_path, *rows, "pho/none.jpg,dal", rows[0]))
    expected = dict(before)
    expected["dal/0000.jpg"] = (before["dal/0000.jpg"][0], "naan")
    del expected["naan/0001.jpg"], expected["naan/0002.jpg"]
    assert label_of(data) == expected
    splits = ("train", "val", "test")
    assert data.audit["counts"] == {
        name: {split: list(expected.values()).count((split, name)) for split in splits}
        for name in ("dal", "naan", "pho")
    }
    assert any("1 photos relabeled, 2 dropped, 1 confirmed" in note for note in data.notes)
    assert any(note.startswith("warning") and note.endswith(": 1") for note in data.notes)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "first line must be path,label"),
        ("path;label\na;b\n", "separate the columns by commas"),
        ("path,label\na.jpg,dal,naan\n", "line 2 has 3 columns instead of 2"),
        ('path,label\n"a.jpg,dal\n', "is not CSV"),
        ("path,label\n\n,dal\n", "line 3 names no photo"),
        ("path,label\na.jpg,***\n", "no such class"),
        ("path,label\na.jpg,---\n", "no letter or digit"),
        ("path,label\na.jpg,dal\n./a.jpg,naan\n", "line 3 calls a.jpg 'naan', line 2 'dal'"),
        ("path,label\ndal/0000.jpg,nan\n", "did you mean naan"),
        ("path,label\n../photos2/a.jpg,dal\n", "is outside"),
        ("path,label\n/etc/passwd,dal\n", "is outside"),
        ("path,label\nfood/dal/0000.jpg,naan\n", "none of its 1 photos"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(
    photos: Path, tmp_path: Path, text: str, problem: str
) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=problem) as raised:
        load_food_data(photos, labels=file)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


def test_two_paths_of_a_photo_must_not_contradict_each_other(photos: Path, tmp_path: Path) -> None:
    whole = f"{photos}/dal/0000.jpg"
    load_food_data(photos, labels=labels_file(tmp_path, "dal/0000.jpg,pho", f"{whole},pho"))
    with pytest.raises(
        DataError, match=r"0000\.jpg is called 'naan', and under another path 'pho'"
    ):
        load_food_data(photos, labels=labels_file(tmp_path, "dal/0000.jpg,pho", f"{whole},naan"))


def test_a_class_called_drop_cannot_be_kept_apart(tmp_path: Path) -> None:
    """Licorice is called so in the Netherlands; "keep" would leave its photos out."""
    photos = write_tree(tmp_path / "photos", {"dal": 12, "drop": 12})
    assert load_food_data(photos).classes == ["dal", "drop"]
    with pytest.raises(DataError, match="a class is called 'drop'"):
        load_food_data(photos, labels=labels_file(tmp_path, "dal/0000.jpg,dal"))


def test_files_that_are_no_text_or_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    for name, problem in (("photo.jpg", "UTF-8"), ("none.csv", "No such file"), (".", "directory")):
        with pytest.raises(DataError, match=problem):
            read_labels(tmp_path / name)


def test_a_class_keeps_a_photo_to_train_on(photos: Path, tmp_path: Path) -> None:
    file = labels_file(tmp_path, *(f"dal/{i:04d}.jpg,drop" for i in range(12)))
    with pytest.raises(DataError, match="no training image of dal is left"):
        load_food_data(photos, labels=file)


def test_classes_that_are_left_out_are_known(photos: Path, tmp_path: Path) -> None:
    file = labels_file(tmp_path, "dal/0000.jpg,pho", "pho/0000.jpg,dal")
    data = load_food_data(photos, labels=file, classes=["dal", "naan"])
    assert "dal/0000.jpg" not in label_of(data)
    assert data.audit["labels"]["unused"] == 1


def test_custom_photos_are_named_by_their_own_folder(photos: Path, tmp_path: Path) -> None:
    custom = write_tree(tmp_path / "custom", {"dosa": 6})
    write_images(custom / "dal", 1)  # dal/0000.jpg is in both folders
    both = load_food_data(photos, custom_data_dir=custom)
    places = [p for split in (both.train, both.val, both.test) for p in split.paths]
    rows = ("dosa/0000.jpg,naan", f"{custom}/dal/0000.jpg,pho")
    data = load_food_data(photos, custom_data_dir=custom, labels=labels_file(tmp_path, *rows))
    assert label_of(data)["dosa/0000.jpg"][1] == "naan"
    assert data.audit["labels"]["relabeled"] == 2
    assert name_in_labels(f"{custom}/dal/0000.jpg", [photos, custom], places) == (
        f"{custom}/dal/0000.jpg"
    )
    with pytest.raises(DataError, match="give its whole path"):
        file = labels_file(tmp_path, "dal/0000.jpg,pho")
        load_food_data(photos, custom_data_dir=custom, labels=file)


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.lists(st.text(NAME_LETTERS, min_size=1)))
def test_every_name_that_the_page_writes_is_found_again(names: list[str]) -> None:
    root = Path(os.sep, "data", "photos")
    names = [n for n in names if n not in (".", "..") and n == n.strip()]
    paths = [str(root / "dal" / name) for name in names]
    for path in paths:
        name = name_in_labels(path, [root], paths)
        assert os.path.normpath(root / name) == path


def test_a_run_is_resumed_with_the_labels_that_it_began_with(photos: Path, tmp_path: Path) -> None:
    rows = ("dal/0000.jpg,naan", "pho/0003.jpg,drop")
    then = load_food_data(photos, labels=labels_file(tmp_path, *rows))
    write_manifest(tmp_path, then)
    same = load_food_data(photos, labels=labels_file(tmp_path, *reversed(rows)))
    assert fingerprint(same) == fingerprint(then)
    (photos / "naan" / "0004.jpg").unlink()
    fewer = load_food_data(photos, labels=labels_file(tmp_path, *rows))
    assert what_is_new(fewer, then) == []
    found = data_of_run(tmp_path, fingerprint(then), fewer)
    assert fingerprint(found) == fingerprint(then)
    for others in (None, labels_file(tmp_path, rows[0])):
        reasons = what_is_new(load_food_data(photos, labels=others), then)
        assert reasons == ["the labels differ (--labels)"]


def test_labels_are_applied_without_touching_a_file(tmp_path: Path) -> None:
    """Nothing is opened but the file of labels: the photos here do not exist."""
    parts = {"train": {"dal": ["/d/dal/1.jpg", "/d/dal/2.jpg"], "naan": ["/d/naan/1.jpg"]}}
    file = labels_file(tmp_path, "dal/1.jpg,naan")
    changed, _ = apply_labels(file, parts, [Path("/d")], ["dal", "naan"])
    moved = ["/d/dal/1.jpg", "/d/naan/1.jpg"]
    assert changed == {"train": {"dal": ["/d/dal/2.jpg"], "naan": moved}}
