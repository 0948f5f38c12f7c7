"""Data sets as people have them: what is read, what is refused, what is said; custom classes."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tests.support.photo_folders import (
    all_paths,
    counts,
    write_food101,
    write_images,
    write_tree,
)

from training.data import sources
from training.data.splits import FoodData, load_food_data
from training.errors import DataError

needs_links = pytest.mark.skipif(os.name == "nt", reason="links need rights there")


def names_in(data: FoodData, split: str, class_name: str) -> set[str]:
    paths = getattr(data, split).paths
    return {Path(p).name for p in paths if Path(p).parent.name == class_name}


def refusal(*args: Path, **kwargs: object) -> str:
    """The one line with which data is refused."""
    with pytest.raises(DataError) as caught:
        load_food_data(*args, **kwargs)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def deny_listing(monkeypatch: pytest.MonkeyPatch, denied: Path, number: int = errno.EACCES) -> None:
    """chmod does not stop root, under whom tests in containers run."""
    scandir = os.scandir

    def guarded(path: Path) -> object:
        if Path(path) == denied:
            raise OSError(number, os.strerror(number), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)


# Class folders and splits ---------------------------------------------------------------------


def test_bare_class_folders(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "photos", {"Naan Bread": 10, "dal": 3})
    data = load_food_data(root)
    assert data.class_to_idx == {"dal": 0, "naan_bread": 1}
    assert data.audit["counts"]["naan_bread"] == {"train": 6, "val": 2, "test": 2}
    assert data.audit["counts"]["dal"] == {"train": 1, "val": 1, "test": 1}


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Val", "Test"),
        ("TRAIN", "VALID", "TEST"),
        ("training", "validation", "testing"),
        ("training", "validation", "evaluation"),
        ("train", "dev", "eval"),
        ("Training_Set", "validation-set", "Test Set"),
    ],
)
def test_splits_in_every_common_spelling(tmp_path: Path, train: str, val: str, test: str) -> None:
    for name, count in ((train, 10), (val, 4), (test, 3)):
        write_tree(tmp_path / name, {"dal": count, "naan": count})
    data = load_food_data(tmp_path)
    assert data.class_to_idx == {"dal": 0, "naan": 1} and counts(data) == (20, 8, 6)


def test_image_folder_tree_with_splits_of_its_own(tmp_path: Path) -> None:
    write_tree(tmp_path / "train", {"dal": 10, "naan": 10})
    write_tree(tmp_path / "val", {"dal": 4, "naan": 4})
    write_tree(tmp_path / "test", {"dal": 3})
    write_tree(tmp_path / "valid", {"dal": 1})
    data = load_food_data(tmp_path)
    assert counts(data) == (20, 8, 3)
    assert any("not used" in note and "valid" in note for note in data.notes)
    assert any("no test images for naan" in note for note in data.notes)
    shutil.rmtree(tmp_path / "test")
    assert counts(load_food_data(tmp_path)) == (16, 8, 4)
    shutil.rmtree(tmp_path / "val")
    shutil.rmtree(tmp_path / "valid")
    assert counts(load_food_data(tmp_path)) == (12, 4, 4)


def test_a_class_that_train_lacks_is_named(tmp_path: Path) -> None:
    write_tree(tmp_path / "train", {"dal": 4, "naan": 4})
    write_tree(tmp_path / "val", {"dal": 4, "samosa": 4})
    assert "samosa (0)" in refusal(tmp_path)


@pytest.mark.parametrize(
    "place",
    [
        ("dataset",),
        ("food", "food"),
        ("train",),
        ("Takeout", "Google Photos"),
    ],
)
@pytest.mark.parametrize("layout", ["classes", "splits", "food-101"])
def test_one_folder_too_many_is_gone_through(
    tmp_path: Path, place: tuple[str, ...], layout: str
) -> None:
    root = tmp_path.joinpath(*place)
    if layout == "food-101":
        write_food101(root / "food-101", {"pizza": (5, 2), "ramen": (5, 2)})
    for folder in {"classes": [root], "splits": [root / "train", root / "test"]}.get(layout, ()):
        write_tree(folder, {"dal": 5, "naan": 5})
    write_images(tmp_path / "__MACOSX", 1)
    (tmp_path / "readme.txt").write_text("unpacked with love")
    data = load_food_data(tmp_path)
    assert len(data.class_to_idx) == 2
    assert any(place[-1] in note for note in data.notes)


def test_one_folder_too_many_in_a_split(tmp_path: Path) -> None:
    write_tree(tmp_path / "train" / "train", {"dal": 5, "naan": 5})
    write_tree(tmp_path / "test" / "images", {"dal": 2, "naan": 2})
    assert counts(load_food_data(tmp_path)) == (8, 2, 4)


def test_folders_of_images_that_lie_deeper_are_named(tmp_path: Path) -> None:
    write_tree(tmp_path / "dataset", {"dal": 5, "naan": 5})
    write_tree(tmp_path / "backup", {"dal": 5, "naan": 5})
    (tmp_path / "docs").mkdir()
    assert "folders of images in backup, dataset: give one" in refusal(tmp_path)


def test_the_drawn_sample_is_never_taken_for_photos(tmp_path: Path) -> None:
    write_food101(tmp_path / "sample" / "food-101", {"pizza": (5, 2), "ramen": (5, 2)})
    write_tree(tmp_path / "mine", {"dal": 5, "naan": 5})
    assert load_food_data(tmp_path).class_to_idx == {"dal": 0, "naan": 1}
    assert counts(load_food_data(tmp_path / "sample")) == (8, 2, 4)


# Food-11 comes in two packings.


def test_food11_with_class_folders(tmp_path: Path) -> None:
    for split, count in (("training", 6), ("validation", 3), ("evaluation", 2)):
        write_tree(tmp_path / "food11" / split, {"Bread": count, "Dairy product": count})
    data = load_food_data(tmp_path)
    assert data.class_to_idx == {"bread": 0, "dairy_product": 1} and counts(data) == (12, 6, 4)


def test_food11_with_the_class_in_the_file_name_is_refused_with_the_way_out(
    tmp_path: Path,
) -> None:
    for split in ("training", "validation", "evaluation"):
        write_images(tmp_path / split, 4)
        for i in range(4):
            (tmp_path / split / f"{i:04}.jpg").rename(tmp_path / split / f"{i % 2}_{i}.jpg")
    message = refusal(tmp_path)
    assert f"{tmp_path / 'training'} has no class folder" in message
    assert "move its 4 images into folders named after their class" in message
    assert "training/bread/0_0.jpg" in message


@pytest.mark.parametrize(
    "names", [("validation", "evaluation"), ("val", "test"), ("Valid", "Dev"), ("test",)]
)
def test_words_for_splits_are_not_the_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    write_tree(tmp_path / "words", dict.fromkeys(names, 10))
    assert "and no train/" in refusal(tmp_path / "words")
    assert "splits, not classes" in custom_refusal(tmp_path, tmp_path / "words")


def test_a_word_for_a_split_among_classes_is_told(tmp_path: Path) -> None:
    data = load_food_data(write_tree(tmp_path, {"dal": 5, "naan": 5, "test": 5}))
    assert len(data.class_to_idx) == 3
    assert any(note.startswith("warning: test counts as a class") for note in data.notes)


# What lies about ------------------------------------------------------------------------------


def test_junk_is_never_a_class_or_a_sample(tmp_path: Path) -> None:
    clean = write_tree(tmp_path / "clean", {"dal": 5, "naan": 5})
    messy = shutil.copytree(clean, tmp_path / "messy")
    for junk in (".ipynb_checkpoints", "__MACOSX", ".cache", "#recycle", "lost+found"):
        write_images(messy / junk, 9)
    for junk in ("Thumbs.db", ".DS_Store", "._0001.jpg", ".hidden.jpg"):
        (messy / "dal" / junk).write_bytes(b"junk")
    (messy / "dal" / "recipe.txt").write_text("lentils")
    (messy / "dal" / "menu.pdf").write_bytes(b"%PDF")
    (messy / "dal" / "scan.tif").write_bytes(b"II")
    (messy / "dal" / "dead.jpg").symlink_to(messy / "nowhere.jpg")
    (messy / "nothing").mkdir()
    write_images(messy / "naan" / "more", 2)
    expected, data = load_food_data(clean), load_food_data(messy)
    assert data.class_to_idx == expected.class_to_idx
    assert [p.replace(str(messy), str(clean)) for p in data.train.paths] == [*expected.train.paths]
    skipped = {Path(entry["path"]).name for entry in data.audit["skipped"]}
    assert skipped == {"scan.tif", "dead.jpg", "more", "nothing"}
    text = "\n".join(data.notes)
    assert "nothing" in text and "TIF: scan.tif" in text and "1 .pdf, 1 .txt" in text


def test_a_google_takeout_folder(tmp_path: Path) -> None:
    albums = tmp_path / "Takeout" / "Google Photos"
    write_tree(albums, {"Pizza": 6, "Ramen": 6, "Photos from 2023": 6})
    for image in list(albums.rglob("*.jpg")):
        image.with_name(f"{image.name}.supplemental-metadata.json").write_text("{}")
    (albums / "Pizza" / "metadata.json").write_text("{}")
    data = load_food_data(tmp_path)
    assert data.class_to_idx.keys() == {"pizza", "ramen", "photos_from_2023"}
    assert any("dates or cameras: photos_from_2023" in note for note in data.notes)
    assert "files that are not pictures: 19 .json" in data.notes


def test_nothing_of_the_base_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object) -> None:
        raise AssertionError(f"{source} was decoded")

    root = write_food101(tmp_path / "food-101", {"pizza": (5, 2), "ramen": (5, 2)})
    monkeypatch.setattr(sources, "load_image", refuse)
    assert counts(load_food_data(root)) == (8, 2, 4)


def test_many_classes_and_files_are_listed_within_seconds(tmp_path: Path) -> None:
    for number in range(1_000):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        for image in range(5):
            (folder / f"{image}.jpg").write_bytes(b"%d-%d" % (number, image))
    data = load_food_data(tmp_path)
    assert len(data.class_to_idx) == 1_000 and counts(data) == (3_000, 1_000, 1_000)
    assert max(map(len, data.notes)) < 500


@pytest.mark.parametrize("ending", [".HEIC", ".heif", ""])
def test_photos_of_phones_are_read(tmp_path: Path, ending: str) -> None:
    """HEIC, by its ending or, where an export dropped that, by its content."""
    pillow_heif = pytest.importorskip("pillow_heif")
    base = write_tree(tmp_path / "base", {"dal": 5, "naan": 5})
    for i in range(5):
        image = Image.new("RGB", (64, 48), (40 * i, 90, 20))
        path = tmp_path / "custom" / "dosa" / f"IMG_{i}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pillow_heif.from_pillow(image).save(path)
        path.with_name(f"IMG_{i}.MOV").write_bytes(b"a live photo's film")
        path.with_name(f"IMG_{i}.AAE").write_bytes(b"its edits")
    data = load_food_data(base, custom_data_dir=tmp_path / "custom")
    assert data.audit["counts"]["dosa"] == {"train": 3, "val": 1, "test": 1}
    assert "files that are not pictures: 5 .aae, 5 .mov" in data.notes


# What is refused, and how ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["food.zip", "Photos.TAR.GZ", "takeout.tgz"])
@pytest.mark.parametrize("flag", ["--data_dir", "--custom_data_dir"])
def test_an_archive_is_to_be_unpacked(tmp_path: Path, name: str, flag: str) -> None:
    base = write_tree(tmp_path / "base", {"dal": 5, "naan": 5})
    packed = tmp_path / name
    packed.write_bytes(b"PK")
    data = (packed, {}) if flag == "--data_dir" else (base, {"custom_data_dir": packed})
    message = refusal(data[0], **data[1])
    assert message == f"{flag} {packed} is a file; unpack it and give the folder"


def test_a_file_is_no_data_folder(tmp_path: Path) -> None:
    (tmp_path / "lunch.jpg").write_bytes(b"x")
    assert "lunch.jpg is a file; give a folder" in refusal(tmp_path / "lunch.jpg")


def test_loose_images_and_empty_trees_start_no_download(tmp_path: Path) -> None:
    write_images(tmp_path / "loose", 3)
    (tmp_path / "tree" / "train").mkdir(parents=True)
    for folder in ("loose", "tree"):
        assert "no class folder with images" in refusal(tmp_path / folder)
    assert "its images lie in no class folder: 0000.jpg" in refusal(tmp_path / "loose")


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_folder_of_unread_formats_says_so(tmp_path: Path, depth: int) -> None:
    for folder in (tmp_path / ("a", "dal", "train/dal")[depth], tmp_path / "train" / "naan"):
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(3):
            (folder / f"IMG_{i}.CR2").write_bytes(b"x")
    message = refusal(tmp_path)
    assert "skipped 6 (unsupported format): CR2: IMG_0.CR2" in message
    assert message.endswith("save them as JPEG")


def test_a_mistyped_path_starts_no_download(tmp_path: Path) -> None:
    assert "nor does the folder above" in refusal(tmp_path / "no" / "such" / "place")
    assert not any(tmp_path.iterdir())


def test_locked_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path, {"dal": 5, "naan": 5, "locked": 5})
    deny_listing(monkeypatch, tmp_path / "locked")
    data = load_food_data(tmp_path)
    assert data.class_to_idx == {"dal": 0, "naan": 1}
    assert "warning: skipped 1 (cannot be opened: Permission denied): locked" in data.notes
    deny_listing(monkeypatch, tmp_path / "naan")
    message = refusal(tmp_path)
    assert "found only: dal" in message and "Permission denied): locked, naan" in message


def test_where_all_is_locked_the_flag_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path / "inner", {"dal": 5, "naan": 5})
    for name in ("dal", "naan"):
        deny_listing(monkeypatch, tmp_path / "inner" / name)
    assert "Permission denied): dal, naan" in refusal(tmp_path)
    deny_listing(monkeypatch, tmp_path)
    with pytest.raises(DataError) as caught:
        load_food_data(tmp_path)
    assert str(caught.value) == (
        f"--data_dir: {tmp_path} cannot be read (Permission denied); check that it is there and "
        "that you may open it"
    )
    assert isinstance(caught.value.__cause__, PermissionError)


def test_a_disk_that_fails_while_it_is_listed_ends_with_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path, {"dal": 5, "naan": 5, "idli": 5})
    deny_listing(monkeypatch, tmp_path / "idli", errno.EIO)
    message = refusal(tmp_path)
    assert message.startswith(f"--data_dir: {tmp_path / 'idli'} cannot be read (Input/output error")


@needs_links
def test_a_circle_of_links_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    message = refusal(tmp_path / "a")
    assert message.startswith("--data_dir: ") and "symbolic links" in message
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data")
    assert "no class folder with images" in refusal(tmp_path / "data")


@needs_links
def test_data_behind_links(tmp_path: Path) -> None:
    real = write_tree(tmp_path / "real", {"dal": 5, "naan": 5})
    (tmp_path / "linked").mkdir()
    for name in ("dal", "naan"):
        (tmp_path / "linked" / name).symlink_to(real / name)
    (tmp_path / "data").symlink_to("linked")
    assert counts(load_food_data(tmp_path / "data")) == counts(load_food_data(real))


def test_a_file_that_vanishes_while_it_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_tree(tmp_path, {"dal": 6, "naan": 6})
    scandir = os.scandir

    def vanishing(path: Path) -> object:
        entries = scandir(path)
        if Path(path).name == "naan":
            listed = list(entries)
            (root / "naan" / "0003.jpg").unlink(missing_ok=True)
            entries.close()
            return Listed(listed)
        return entries

    class Listed(list):  # type: ignore[type-arg]
        def __enter__(self) -> "Listed":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", vanishing)
    data = load_food_data(root)
    assert sum(counts(data)) == 11
    (entry,) = data.audit["skipped"]
    assert entry["path"].endswith("0003.jpg") and "No such file" in entry["reason"]


# Custom classes -------------------------------------------------------------------------------


def custom_refusal(base: Path, custom: Path) -> str:
    """The lines with which custom data is refused."""
    if not (base / "food-101").exists():
        write_food101(base / "food-101", {"pizza": (5, 2), "ramen": (5, 2)})
    with pytest.raises(DataError) as caught:
        load_food_data(base, custom_data_dir=custom)
    return str(caught.value)


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    return write_food101(tmp_path / "base" / "food-101", {"pizza": (10, 3), "samosa": (20, 5)})


def test_custom_classes_join_and_extend(base_dir: Path, tmp_path: Path) -> None:
    custom = write_tree(
        tmp_path / "custom", {"biryani": 10, "Paneer Tikka": 5, "paneer-tikka": 5, "Samosa": 10}
    )
    (custom / "biryani" / "Thumbs.db").write_bytes(b"junk")
    (custom / ".git").mkdir()
    data = load_food_data(base_dir, custom_data_dir=custom)
    assert data.class_to_idx == {"pizza": 0, "samosa": 1, "biryani": 2, "paneer_tikka": 3}
    assert data.audit["counts"]["samosa"] == {"train": 22, "val": 6, "test": 7}
    assert data.audit["counts"]["biryani"] == {"train": 6, "val": 2, "test": 2}
    assert data.audit["counts"]["paneer_tikka"] == {"train": 6, "val": 2, "test": 2}
    assert data.notes[-4:] == [
        "Custom class  images",
        "biryani           10  new class",
        "paneer_tikka      10  new class",
        "samosa            10  joins 20 training images",
    ]
    alone = load_food_data(base_dir)
    for part in ("train", "val", "test"):
        assert names_in(data, part, "pizza") == names_in(alone, part, "pizza")


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_single_photo_may_join_a_class_but_not_make_one(
    count: int, base_dir: Path, tmp_path: Path
) -> None:
    known = load_food_data(base_dir).class_to_idx
    joined = next(iter(known))
    write_tree(tmp_path / "joining", {joined: count})
    data = load_food_data(base_dir, custom_data_dir=tmp_path / "joining")
    assert data.class_to_idx == known
    assert data.audit["custom"][0]["images"] == count
    write_tree(tmp_path / "new", {joined: count, "vada_pav": count})
    with pytest.raises(DataError, match=f"vada_pav: readable images: {count}, needed: 5"):
        load_food_data(base_dir, custom_data_dir=tmp_path / "new")


def test_custom_classes_beside_official_splits(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        write_tree(tmp_path / "base" / part, {"dal": 5, "naan": 5})
    custom = write_tree(tmp_path / "custom", {"dosa": 10})
    data = load_food_data(tmp_path / "base", custom_data_dir=custom)
    assert data.audit["counts"]["dosa"] == {"train": 6, "val": 2, "test": 2}
    assert data.audit["counts"]["dal"] == {"train": 5, "val": 5, "test": 5}


def test_custom_classes_one_folder_too_deep(base_dir: Path, tmp_path: Path) -> None:
    custom = write_tree(tmp_path / "custom" / "my dishes", {"biryani": 6})
    data = load_food_data(base_dir, custom_data_dir=custom.parent)
    assert data.class_to_idx == {"pizza": 0, "samosa": 1, "biryani": 2}


def test_a_missing_custom_folder_is_a_warning(base_dir: Path, tmp_path: Path) -> None:
    data = load_food_data(base_dir, custom_data_dir=tmp_path / "gone")
    assert all_paths(data) == all_paths(load_food_data(base_dir))
    assert any(note.startswith("warning: no custom data in") for note in data.notes)


def test_one_error_lists_every_offender(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    custom = write_tree(tmp_path / "custom", {"biryani": 6, "dosa": 3, "dal": 7, "locked": 5})
    (custom / "idli").mkdir()
    (custom / "naan").mkdir()
    (custom / "naan" / "1.tif").write_bytes(b"not read")
    (custom / "dal" / "menu.jpg").write_bytes(b"%PDF-1.7 renamed")
    half = (custom / "dal" / "0000.jpg").read_bytes()
    (custom / "dal" / "0001.jpg").write_bytes(half[: len(half) - 20])
    (custom / "---").mkdir()
    write_images(custom, 1)
    deny_listing(monkeypatch, custom / "locked")
    lines = custom_refusal(base_dir, custom).splitlines()
    assert lines[0] == f"problems with the custom data in {custom}: 8"
    listed = [line for line in lines if line.startswith("  ")]
    assert len(listed) == 8 and "biryani" not in "".join(listed)
    text = "\n".join(lines)
    for offender in (
        "0000.jpg: not in a class folder",
        f"{Path('dal', '0001.jpg')}: ",
        f"{Path('dal', 'menu.jpg')}: not an image",
        "dosa: readable images: 3, needed: 5",
        "idli: readable images: 0, needed: 5",
        "naan: readable images: 0, needed: 5",
        "---: no letter",
        "locked: readable images: 0, needed: 5",
        "(cannot be opened: Permission denied): locked",
        "(unsupported format): TIF: 1.tif; save them as JPEG",
    ):
        assert offender in text


def test_a_few_unreadable_files_among_many_are_skipped_and_named(
    base_dir: Path, tmp_path: Path
) -> None:
    custom = write_tree(tmp_path / "custom", {"biryani": 30, "dosa": 30})
    for name in ("biryani/0003.jpg", "dosa/0004.jpg", "dosa/0005.jpg"):
        (custom / name).write_bytes(b"\xff\xd8\xff no more")
    data = load_food_data(base_dir, custom_data_dir=custom)  # 3 of 60 are 5%
    assert sum(data.audit["counts"]["dosa"].values()) == 28
    assert [Path(entry["path"]).name for entry in data.audit["skipped"]] == [
        *("0003.jpg", "0004.jpg", "0005.jpg")
    ]
    assert any(note.startswith("warning: skipped 3 (the image") for note in data.notes)
    (custom / "dosa" / "0006.jpg").write_bytes(b"")  # empty, so seen in the listing
    (custom / "dosa" / "0007.jpg").write_bytes(b"\xff\xd8\xff no more")
    lines = custom_refusal(base_dir, custom).splitlines()
    assert lines[0].endswith(": 4") and "0006.jpg" in lines[-1]


def test_a_class_that_unreadable_files_make_too_small_is_an_error(
    base_dir: Path, tmp_path: Path
) -> None:
    custom = write_tree(tmp_path / "custom", {"biryani": 60, "dosa": 5})
    (custom / "dosa" / "0004.jpg").write_bytes(b"\xff\xd8\xff no more")
    text = custom_refusal(base_dir, custom)
    assert "dosa: readable images: 4, needed: 5" in text and f"{Path('dosa', '0004.jpg')}: " in text


def test_a_disk_that_fails_while_custom_images_are_checked(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    custom = write_tree(tmp_path / "custom", {"biryani": 6})

    def fail(path: str, _limits: object) -> None:
        raise OSError(errno.EIO, "Input/output error", path)

    monkeypatch.setattr(sources, "load_image", fail)
    assert refusal(base_dir, custom_data_dir=custom).startswith("--custom_data_dir: ")


def test_custom_data_without_class_folders(base_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "custom").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        load_food_data(base_dir, custom_data_dir=tmp_path / "custom")
    (tmp_path / "custom.txt").write_text("biryani")
    with pytest.raises(DataError, match=r"custom\.txt is a file"):
        load_food_data(base_dir, custom_data_dir=tmp_path / "custom.txt")


def test_progress_is_told_when_there_are_many(
    base_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sources, "PROGRESS_EVERY", 5)
    custom = write_tree(tmp_path / "custom", {"dal": 12})
    with caplog.at_level("INFO"):
        load_food_data(base_dir, custom_data_dir=custom)
    assert [r.getMessage() for r in caplog.records] == [
        "checked 5 of 12 custom images",
        "checked 10 of 12 custom images",
    ]
