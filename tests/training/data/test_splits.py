"""The data of a run: what is found, merged, split and refused. No image leaves this machine."""

import errno
import hashlib
import http.server
import io
import json
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import Food101
from torchvision.datasets import utils as torchvision_utils

from training.data import sources as image_sources
from training.data import splits as datasets
from training.data.splits import (
    FoodData,
    Split,
    build_class_to_idx,
    find_duplicates,
    load_food_data,
    normalise_class_name,
)
from training.errors import DataError

at_least_100 = hypothesis_settings(max_examples=150, deadline=None)


def write_images(folder: Path, count: int) -> None:
    """`count` tiny JPEGs, no two of the same bytes in all of a test tree."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        digest = hashlib.sha256(f"{folder}/{i}".encode()).digest()
        image = Image.frombytes("RGB", (3, 3), digest[:27])
        image.save(folder / f"{i:04d}.jpg", comment=digest.hex())


def write_tree(root: Path, classes: Mapping[str, int]) -> Path:
    for name, count in classes.items():
        write_images(root / name, count)
    return root


def write_food101(folder: Path, classes: Mapping[str, tuple[int, int]]) -> Path:
    """Food-101's own layout; class -> (train, test) counts."""
    lists: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for name, (train, test) in classes.items():
        write_images(folder / "images" / name, train + test)
        ids = [f"{name}/{i:04d}" for i in range(train + test)]
        lists["train"][name], lists["test"][name] = ids[:train], ids[train:]
    (folder / "meta").mkdir()
    for part, ids_of in lists.items():
        (folder / "meta" / f"{part}.json").write_text(json.dumps(ids_of))
    return folder.parent


def names_in(split: Split, class_name: str) -> set[str]:
    return {Path(p).name for p in split.paths if Path(p).parent.name == class_name}


def counts(data: FoodData) -> tuple[int, int, int]:
    return len(data.train), len(data.val), len(data.test)


def all_paths(data: FoodData) -> tuple[tuple[str, ...], ...]:
    return data.train.paths, data.val.paths, data.test.paths


# --- names and class_to_idx ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Paneer Tikka", "paneer_tikka"),
        ("paneer-tikka", "paneer_tikka"),
        ("  Pav   Bhaji ", "pav_bhaji"),
        ("pav\u2013bhaji", "pav_bhaji"),
        (".Dal", "dal"),
        ("=1+1", "1+1"),
        ("@dal", "dal"),
        ("cre\u0301me BRU\u0302LE\u0301E", "cr\u00e9me_br\u00fbl\u00e9e"),
        ("---", ""),
    ],
)
def test_class_names_are_normalised(name: str, expected: str) -> None:
    assert normalise_class_name(name) == expected


@at_least_100
@given(st.text())
def test_a_normalised_name_stays_as_it_is(name: str) -> None:
    once = normalise_class_name(name)
    assert normalise_class_name(once) == once
    assert once == once.strip() and not once.startswith((".", "_"))


@at_least_100
@given(st.sets(st.text(min_size=1)), st.sets(st.text(min_size=1)))
def test_class_to_idx_is_a_bijection_that_custom_names_extend(
    base: set[str], custom: set[str]
) -> None:
    class_to_idx = build_class_to_idx(base, custom)
    assert class_to_idx.keys() == base | custom
    assert sorted(class_to_idx.values()) == list(range(len(base | custom)))
    alone = build_class_to_idx(base, ())
    assert list(alone) == sorted(base)
    assert {name: class_to_idx[name] for name in base} == alone


# --- the split -----------------------------------------------------------------------------------

pool_counts = st.dictionaries(
    st.sampled_from(["dal", "dosa", "naan", "idli"]), st.integers(3, 40), min_size=2
)


def pools_of(class_counts: Mapping[str, int]) -> dict[str, list[str]]:
    return {name: [f"/{name}/{i}.jpg" for i in range(n)] for name, n in class_counts.items()}


@at_least_100
@given(pool_counts, st.floats(0.05, 0.95), st.integers(0, 2**32))
def test_split_is_complete_disjoint_and_stratified(
    class_counts: dict[str, int], share: float, seed: int
) -> None:
    base = image_sources.BaseData("test", pools_of(class_counts), None, None)
    parts = datasets._split(base, {}, share, None, seed)
    for name, count in class_counts.items():
        pieces = [parts[part][name] for part in ("train", "val", "test")]
        assert all(pieces)
        assert sorted([*pieces[0], *pieces[1], *pieces[2]]) == sorted(pools_of(class_counts)[name])
        assert len(parts["test"][name]) == min(max(1, round(count * share)), count - 2)


@at_least_100
@given(pool_counts, st.integers(0, 2**32), st.randoms())
def test_a_new_class_or_another_order_moves_no_image(
    class_counts: dict[str, int], seed: int, random: Random
) -> None:
    pools = pools_of(class_counts)
    before = datasets._split(image_sources.BaseData("", pools, None, None), {}, 0.2, None, seed)
    mixed = {name: random.sample(pools[name], len(pools[name])) for name in reversed(pools)}
    mixed["apple_pie"] = [f"/apple_pie/{i}.jpg" for i in range(7)]
    after = datasets._split(image_sources.BaseData("", mixed, None, None), {}, 0.2, None, seed)
    for part, pools_before in before.items():
        assert {name: after[part][name] for name in pools_before} == pools_before


def test_split_of_food101_follows_the_seed(tmp_path: Path) -> None:
    root = write_food101(tmp_path / "food-101", {"pizza": (20, 5), "apple_pie": (10, 5)})
    data = load_food_data(root)
    assert data.class_to_idx == {"apple_pie": 0, "pizza": 1}
    assert counts(data) == (24, 6, 10)
    assert np.bincount(data.train.labels).tolist() == [8, 16]
    assert np.bincount(data.val.labels).tolist() == [2, 4]
    assert data.train.labels.dtype == np.int64
    for path, label in zip(data.train.paths, data.train.labels, strict=True):
        assert data.class_to_idx[Path(path).parent.name] == label
        assert Path(path).is_absolute()
    assert all_paths(load_food_data(root)) == all_paths(data)
    other = load_food_data(root, seed=1)
    assert set(other.test.paths) == set(data.test.paths)
    assert set(other.val.paths) != set(data.val.paths)
    json.dumps(data.audit)
    assert data.audit["counts"]["pizza"] == {"train": 16, "val": 4, "test": 5}


def test_limits_keep_the_first_of_each_class(tmp_path: Path) -> None:
    root = write_food101(tmp_path / "food-101", {"pizza": (20, 12), "ramen": (20, 3)})
    data = load_food_data(root, images_per_class=10)
    assert counts(data) == (16, 4, 10 + 3)
    assert counts(load_food_data(root, images_per_class=10, train_split=0.5)) == (10, 10, 13)


@pytest.mark.parametrize("request_", [{"images_per_class": 1}, {"train_split": 1.0}])
def test_impossible_requests_are_refused(tmp_path: Path, request_: dict[str, float]) -> None:
    with pytest.raises(DataError, match=next(iter(request_))):
        load_food_data(tmp_path, **request_)  # type: ignore[arg-type]


# --- where the images come from ------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "food-101"])
def test_food101_goes_through_torchvision(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_food101(tmp_path / "food-101", {"pizza": (5, 2), "ramen": (5, 2)})
    parts = []
    init = Food101.__init__

    def spy(self: Food101, root: Path, split: str, **kwargs: object) -> None:
        parts.append(split)
        init(self, root, split, **kwargs)

    monkeypatch.setattr(Food101, "__init__", spy)
    assert counts(load_food_data(root / place)) == (8, 2, 4)
    assert parts == ["train", "test"]


def test_food101_layout_under_another_name(tmp_path: Path) -> None:
    write_food101(tmp_path / "my-photos", {"pizza": (5, 2), "ramen": (5, 2)})
    assert counts(load_food_data(tmp_path / "my-photos")) == (8, 2, 4)


def test_food101_images_that_are_gone_or_empty_are_named(tmp_path: Path) -> None:
    root = write_food101(tmp_path / "food-101", {"pizza": (6, 2), "ramen": (6, 2)})
    pizza = root / "food-101" / "images" / "pizza"
    (pizza / "0001.jpg").unlink()
    (pizza / "0002.jpg").write_bytes(b"")
    data = load_food_data(root)
    assert sum(counts(data)) == 14
    left_out = {Path(e["path"]).name: e["reason"] for e in data.audit["left_out"]}
    assert left_out.keys() == {"0001.jpg", "0002.jpg"}
    assert "not on disk" in left_out["0001.jpg"] and "empty" in left_out["0002.jpg"]
    assert any("0001.jpg" in note for note in data.notes)


@pytest.mark.parametrize("text", ["{", "[]", '{"pizza": 3}', None])
def test_broken_food101_lists_are_named(tmp_path: Path, text: str | None) -> None:
    root = write_food101(tmp_path / "food-101", {"pizza": (6, 2), "ramen": (6, 2)})
    listing = root / "food-101" / "meta" / "test.json"
    if text is None:
        listing.unlink()
    else:
        listing.write_text(text)
    with pytest.raises(DataError, match=r"test\.json is not a readable") as caught:
        load_food_data(root)
    assert caught.value.__cause__ is not None


def test_half_a_food101_is_not_trusted(tmp_path: Path) -> None:
    write_images(tmp_path / "food-101" / "images" / "pizza", 3)
    with pytest.raises(DataError, match="incomplete"):
        load_food_data(tmp_path)


def test_bare_class_folders(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "photos", {"Naan Bread": 10, "dal": 3})
    data = load_food_data(root)
    assert data.class_to_idx == {"dal": 0, "naan_bread": 1}
    assert data.audit["counts"]["naan_bread"] == {"train": 6, "val": 2, "test": 2}
    assert data.audit["counts"]["dal"] == {"train": 1, "val": 1, "test": 1}


def test_image_folder_tree_with_parts_of_its_own(tmp_path: Path) -> None:
    write_tree(tmp_path / "train", {"dal": 10, "naan": 10})
    write_tree(tmp_path / "val", {"dal": 4, "naan": 4})
    write_tree(tmp_path / "test", {"dal": 3})
    write_tree(tmp_path / "valid", {"dal": 1})
    data = load_food_data(tmp_path)
    assert counts(data) == (20, 8, 3)
    assert any("valid" in note for note in data.notes)
    assert any("no test images of naan" in note for note in data.notes)
    shutil.rmtree(tmp_path / "test")
    assert counts(load_food_data(tmp_path)) == (16, 8, 4)
    shutil.rmtree(tmp_path / "val")
    assert counts(load_food_data(tmp_path)) == (12, 4, 4)


def test_a_class_that_train_lacks_is_named(tmp_path: Path) -> None:
    write_tree(tmp_path / "train", {"dal": 4, "naan": 4})
    write_tree(tmp_path / "val", {"dal": 4, "samosa": 4})
    with pytest.raises(DataError, match="samosa"):
        load_food_data(tmp_path)


def test_junk_is_never_a_class_or_a_sample(tmp_path: Path) -> None:
    clean = write_tree(tmp_path / "clean", {"dal": 5, "naan": 5})
    messy = shutil.copytree(clean, tmp_path / "messy")
    for junk in (".ipynb_checkpoints", "__MACOSX", ".cache"):
        write_images(messy / junk, 3)
    for junk in ("Thumbs.db", ".DS_Store", "._0001.jpg", ".hidden.jpg"):
        (messy / "dal" / junk).write_bytes(b"junk")
    (messy / "dal" / "recipe.txt").write_text("lentils")
    (messy / "dal" / "dead.jpg").symlink_to(messy / "nowhere.jpg")
    (messy / "nothing").mkdir()
    write_images(messy / "naan" / "more", 2)
    expected, data = load_food_data(clean), load_food_data(messy)
    assert data.class_to_idx == expected.class_to_idx
    assert [p.replace(str(messy), str(clean)) for p in data.train.paths] == [*expected.train.paths]
    left_out = {Path(entry["path"]).name for entry in data.audit["left_out"]}
    assert left_out == {"recipe.txt", "dead.jpg", "more"}
    assert any("nothing" in note for note in data.notes)


def test_folders_of_one_name_are_one_class(tmp_path: Path) -> None:
    data = load_food_data(write_tree(tmp_path, {"Pav Bhaji": 5, "pav-bhaji": 5, "dal": 5}))
    assert data.class_to_idx == {"dal": 0, "pav_bhaji": 1}
    assert sum(data.audit["counts"]["pav_bhaji"].values()) == 10
    assert any("Pav Bhaji" in note and "pav-bhaji" in note for note in data.notes)


def test_nothing_of_the_base_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object) -> None:
        raise AssertionError(f"{source} was decoded")

    root = write_food101(tmp_path / "food-101", {"pizza": (5, 2), "ramen": (5, 2)})
    monkeypatch.setattr(datasets, "load_image", refuse)
    assert counts(load_food_data(root)) == (8, 2, 4)


# --- bad data folders ----------------------------------------------------------------------------


def one_line(error: DataError) -> str:
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"dal": 10}, "one class only"),
        ({"dal": 10, "naan": 2, "idli": 1}, r"idli \(1\), naan \(2\)"),
    ],
)
def test_too_little_data(tmp_path: Path, classes: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_food_data(write_tree(tmp_path, classes))
    assert str(tmp_path) in one_line(caught.value)


def test_a_file_is_no_data_folder(tmp_path: Path) -> None:
    (tmp_path / "food.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"food\.zip is a file"):
        load_food_data(tmp_path / "food.zip")


def test_loose_images_and_empty_trees_start_no_download(tmp_path: Path) -> None:
    write_images(tmp_path / "loose", 3)
    (tmp_path / "tree" / "train").mkdir(parents=True)
    for folder in ("loose", "tree"):
        with pytest.raises(DataError, match="no class folder with images"):
            load_food_data(tmp_path / folder)


def test_a_mistyped_path_starts_no_download(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nor does the folder above"):
        load_food_data(tmp_path / "no" / "such" / "place")
    assert not any(tmp_path.iterdir())


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path, {"dal": 5, "naan": 5})
    deny_listing(monkeypatch, tmp_path / "dal")
    with pytest.raises(DataError, match=r"dal cannot be read \(Permission denied\)") as caught:
        load_food_data(tmp_path)
    assert isinstance(caught.value.__cause__, PermissionError)


def deny_listing(monkeypatch: pytest.MonkeyPatch, denied: Path) -> None:
    """chmod does not stop root, under whom tests in containers run."""
    scandir = os.scandir

    def guarded(path: Path) -> object:
        if Path(path) == denied:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)


def test_no_test_images(tmp_path: Path) -> None:
    root = write_food101(tmp_path / "food-101", {"pizza": (5, 0), "ramen": (5, 0)})
    with pytest.raises(DataError, match="no test images"):
        load_food_data(root)


def test_classes_are_chosen_by_name(tmp_path: Path) -> None:
    base = write_food101(
        tmp_path / "food-101", {"apple_pie": (5, 2), "pizza": (5, 2), "samosa": (5, 2)}
    )
    custom = write_tree(tmp_path / "custom", {"Paneer Tikka": 5, "dosa": 5})
    data = load_food_data(base, custom_data_dir=custom, classes=["Paneer-Tikka", "SAMOSA"])
    assert data.class_to_idx == {"samosa": 0, "paneer_tikka": 1}
    assert set(data.train.labels) == set(data.val.labels) == set(data.test.labels) == {0, 1}
    assert any("dosa" in note for note in data.notes)
    with pytest.raises(DataError, match=r"piza \(did you mean pizza\?\).* 3 classes") as caught:
        load_food_data(base, classes=["piza", "samosa", "xyzzy"])
    assert "xyzzy" in one_line(caught.value)
    with pytest.raises(DataError, match="one class only"):
        load_food_data(base, classes=["pizza", "Pizza"])


# --- custom classes ------------------------------------------------------------------------------


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
        assert names_in(getattr(data, part), "pizza") == names_in(getattr(alone, part), "pizza")


def test_custom_classes_beside_official_parts(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        write_tree(tmp_path / "base" / part, {"dal": 5, "naan": 5})
    custom = write_tree(tmp_path / "custom", {"dosa": 10})
    data = load_food_data(tmp_path / "base", custom_data_dir=custom)
    assert data.audit["counts"]["dosa"] == {"train": 6, "val": 2, "test": 2}
    assert data.audit["counts"]["dal"] == {"train": 5, "val": 5, "test": 5}


def test_a_missing_custom_folder_is_a_warning(
    base_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = load_food_data(base_dir, custom_data_dir=tmp_path / "gone")
    assert all_paths(data) == all_paths(load_food_data(base_dir))
    assert any("gone" in note for note in data.notes) and "gone" in caplog.text


def test_one_error_lists_every_offender(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    custom = write_tree(tmp_path / "custom", {"biryani": 6, "dosa": 3, "dal": 7, "locked": 5})
    (custom / "idli").mkdir()
    (custom / "naan").mkdir()
    (custom / "naan" / "1.heic").write_bytes(b"not read")
    (custom / "dal" / "menu.jpg").write_bytes(b"%PDF-1.7 renamed")
    half = (custom / "dal" / "0000.jpg").read_bytes()
    (custom / "dal" / "0001.jpg").write_bytes(half[: len(half) - 20])
    (custom / "---").mkdir()
    write_images(custom, 1)
    deny_listing(monkeypatch, custom / "locked")
    with pytest.raises(DataError) as caught:
        load_food_data(base_dir, custom_data_dir=custom)
    first, *lines = str(caught.value).splitlines()
    assert str(custom) in first and str(len(lines)) in first
    text = "\n".join(lines)
    for offender in (
        "0000.jpg: not in a class folder",
        f"{Path('dal', '0001.jpg')}: ",
        f"{Path('dal', 'menu.jpg')}: not an image",
        "dosa: readable images: 3, needed: 5",
        "idli: readable images: 0, needed: 5",
        "naan: readable images: 0, needed: 5",
        "---: no letter",
        "locked: Permission denied",
    ):
        assert offender in text
    assert len(lines) == 8 and "biryani" not in text


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
    monkeypatch.setattr(datasets, "PROGRESS_EVERY", 5)
    custom = write_tree(tmp_path / "custom", {"dal": 12})
    with caplog.at_level("INFO"):
        load_food_data(base_dir, custom_data_dir=custom)
    assert [r.getMessage() for r in caplog.records] == [
        "Checked 5 of 12 custom images.",
        "Checked 10 of 12 custom images.",
    ]


# --- duplicates ----------------------------------------------------------------------------------


def test_copies_across_splits_are_reported_and_kept(tmp_path: Path) -> None:
    root = write_food101(tmp_path / "food-101", {"pizza": (5, 2), "ramen": (5, 2)})
    images = root / "food-101" / "images"
    shutil.copy(images / "pizza" / "0006.jpg", images / "ramen" / "0000.jpg")
    shutil.copy(images / "pizza" / "0006.jpg", images / "ramen" / "0001.jpg")
    shutil.copy(images / "ramen" / "0006.jpg", images / "ramen" / "0005.jpg")  # both in test
    data = load_food_data(root)
    assert counts(data) == (8, 2, 4)
    (group,) = data.audit["duplicates"]
    copies = [Path(path).name for paths in group.values() for path in paths]
    assert sorted(copies) == ["0000.jpg", "0001.jpg", "0006.jpg"]
    assert any("more than one split: 1" in note for note in data.notes)


def test_only_whole_equal_files_are_duplicates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    middle = os.urandom(20_000)
    files = {"a": b"1" + middle, "b": b"2" + middle, "c": b"1" + middle, "d": os.urandom(20_001)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    read_whole = []
    content_of = datasets._content
    monkeypatch.setattr(datasets, "_content", lambda p: read_whole.append(p) or content_of(p))

    def split(*names: str) -> Split:
        return Split(tuple(str(tmp_path / n) for n in names), np.zeros(len(names), np.int64))

    groups = find_duplicates({"train": split("a", "b", "gone"), "test": split("c", "d")})
    assert groups == [{"train": [str(tmp_path / "a")], "test": [str(tmp_path / "c")]}]
    assert {Path(path).name for path in read_whole} == {"a", "b", "c"}


# --- the download --------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path: Path) -> bytes:
    source = tmp_path / "source"
    write_food101(source / "food-101", {"pizza": (5, 2), "ramen": (5, 2)})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(source / "food-101", "food-101")
    shutil.rmtree(source)
    return buffer.getvalue()


@pytest.fixture
def served(archive: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Food-101's address leads to loopback; `body` and `status` say what comes from there."""
    answer = SimpleNamespace(body=archive, length=len(archive), status=200)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(answer.status)
            self.send_header("Content-Length", str(answer.length))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(answer.body)

        def log_message(self, *args: object) -> None:
            """Quiet."""

    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(
            Food101, "_URL", f"http://127.0.0.1:{server.server_port}/food-101.tar.gz"
        )
        monkeypatch.setattr(Food101, "_MD5", hashlib.md5(archive).hexdigest())
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20e9))
        yield answer
        server.shutdown()


# From 3.12 on Python asks torchvision to name a filter for unpacking.
@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")
@pytest.mark.usefixtures("served")
class TestDownload:
    @pytest.mark.parametrize("exists", [False, True])
    def test_food101_is_fetched_once(
        self, served: SimpleNamespace, tmp_path: Path, exists: bool
    ) -> None:
        data_dir = tmp_path / "data"
        if exists:
            write_food101(data_dir / "sample" / "food-101", {"drawn": (1, 1)})
            (data_dir / "README.md").write_text("keep me")
        before = set(data_dir.glob("*"))
        assert counts(load_food_data(data_dir)) == (8, 2, 4)
        assert set(data_dir.glob("*")) == before | {data_dir / "food-101"}
        assert not list(data_dir.glob(".*")), "the archive and the temporary folder are gone"
        served.status = 404
        assert counts(load_food_data(data_dir)) == (8, 2, 4)

    def fails_then_works(
        self, data_dir: Path, message: str, mend: Callable[[], None], cause: type[Exception]
    ) -> None:
        with pytest.raises(DataError, match=message) as caught:
            load_food_data(data_dir)
        text = one_line(caught.value)
        assert "--sample" in text and "--data_dir" in text and "by hand" in text
        assert isinstance(caught.value.__cause__, cause)
        assert not data_dir.exists(), "nothing is left of a folder that was made for it"
        mend()
        data_dir.mkdir()
        (data_dir / "notes.txt").write_text("mine")
        assert counts(load_food_data(data_dir)) == (8, 2, 4)
        assert (data_dir / "notes.txt").read_text() == "mine"

    def test_broken_transfer(self, served: SimpleNamespace, archive: bytes, tmp_path: Path) -> None:
        served.body = archive[: len(archive) // 2]
        self.fails_then_works(
            tmp_path / "data",
            "incomplete|IncompleteRead",
            lambda: setattr(served, "body", archive),
            Exception,
        )

    def test_wrong_md5(self, served: SimpleNamespace, archive: bytes, tmp_path: Path) -> None:
        served.body = archive[:-1] + bytes([archive[-1] ^ 1])
        self.fails_then_works(
            tmp_path / "data", "wrong MD5", lambda: setattr(served, "body", archive), RuntimeError
        )

    def test_no_such_page(self, served: SimpleNamespace, tmp_path: Path) -> None:
        served.status = 404
        self.fails_then_works(
            tmp_path / "data", "HTTP Error 404", lambda: setattr(served, "status", 200), OSError
        )

    def test_right_md5_of_a_damaged_archive(
        self,
        served: SimpleNamespace,
        archive: bytes,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        served.body = archive[: len(archive) // 2]
        served.length = len(served.body)
        right = Food101._MD5
        monkeypatch.setattr(Food101, "_MD5", hashlib.md5(served.body).hexdigest())

        def mend() -> None:
            served.body, served.length = archive, len(archive)
            monkeypatch.setattr(Food101, "_MD5", right)

        self.fails_then_works(tmp_path / "data", "could not be downloaded", mend, EOFError)

    @pytest.mark.parametrize("step", ["_urlretrieve", "_extract_tar"])
    def test_the_disk_fills_up(
        self,
        tmp_path: Path,
        step: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fill(*args: object) -> None:
            if step == "_urlretrieve":
                Path(str(args[1])).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            if step == "_urlretrieve":
                patch.setattr(torchvision_utils, step, fill)
            else:
                patch.setitem(torchvision_utils._ARCHIVE_EXTRACTORS, ".tar", fill)
            self.fails_then_works(tmp_path / "data", "No space left", patch.undo, OSError)

    def test_too_little_space_is_said_before(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("started anyway")

        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3e9))
        monkeypatch.setattr(torchvision_utils, "_urlretrieve", refuse)
        with pytest.raises(DataError, match=r"needs 10\.6 GB .* 3\.0 GB are free") as caught:
            load_food_data(tmp_path / "data")
        assert "--sample" in one_line(caught.value)
        assert not (tmp_path / "data").exists()

    def test_a_place_that_cannot_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def deny(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", deny)
            with pytest.raises(DataError, match="Permission denied"):
                load_food_data(tmp_path / "data")
        assert counts(load_food_data(tmp_path / "data")) == (8, 2, 4)

    def test_an_interrupt_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setitem(torchvision_utils._ARCHIVE_EXTRACTORS, ".tar", interrupt)
            with pytest.raises(KeyboardInterrupt):
                load_food_data(tmp_path / "data")
        assert not any((tmp_path / "data").iterdir())
        assert counts(load_food_data(tmp_path / "data")) == (8, 2, 4)

    def test_what_a_killed_download_left(self, tmp_path: Path) -> None:
        old, young = (tmp_path / f"{image_sources.PART_PREFIX}{n}" for n in ("old", "young"))
        for part in (old, young):
            write_food101(part / "food-101", {"half": (1, 1)})
        yesterday = time.time() - 2 * image_sources.PART_IS_STALE_S
        os.utime(old, (yesterday, yesterday))
        assert counts(load_food_data(tmp_path)) == (8, 2, 4)
        assert not old.exists() and young.exists(), "another run may be at work in the young one"


# --- real photos ---------------------------------------------------------------------------------


def test_real_photos_merge(shared_dir: Path) -> None:
    data = load_food_data(
        shared_dir / "data", custom_data_dir=shared_dir / "data" / "indian_dishes"
    )
    assert len(data.class_to_idx) == 10 + 12
    assert list(data.class_to_idx)[:10] == sorted(list(data.class_to_idx)[:10])
    assert data.class_to_idx["butter_chicken"] == 10
    assert counts(data) == (10 * 80 + 12 * 32, 10 * 20 + 12 * 8, 10 * 30 + 12 * 10)
    paths = [path for part in all_paths(data) for path in part]
    assert len(set(paths)) == len(paths) == 1300 + 600
    assert data.audit["left_out"] == []


def test_real_samosas_join_the_class_of_that_name(shared_dir: Path, tmp_path: Path) -> None:
    base = write_food101(tmp_path / "food-101", {"pizza": (10, 5), "samosa": (10, 5)})
    data = load_food_data(base, custom_data_dir=shared_dir / "data" / "indian_dishes", seed=3)
    assert data.class_to_idx["samosa"] == 1 and len(data.class_to_idx) == 2 + 11
    assert data.audit["counts"]["samosa"] == {"train": 40, "val": 10, "test": 15}
    assert data.notes[-1].split() == ["samosa", "50", "joins", "10", "training", "images"]
