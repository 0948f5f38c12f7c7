"""The data of a run: merged, split, selected, audited."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tests.support.photo_folders import all_paths, counts, write_food101, write_tree

from training.data.sources import Source
from training.data.splits import (
    Split,
    build_class_to_idx,
    find_duplicates,
    load_food_data,
    split_images,
)
from training.errors import DataError

at_least_100 = hypothesis_settings(max_examples=150, deadline=None)

# class_to_idx ---------------------------------------------------------------------------------


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


# The split ------------------------------------------------------------------------------------

class_counts_of = st.dictionaries(
    st.sampled_from(["dal", "dosa", "naan", "idli"]), st.integers(3, 40), min_size=2
)


def images_of(class_counts: Mapping[str, int]) -> dict[str, list[str]]:
    return {name: [f"/{name}/{i}.jpg" for i in range(n)] for name, n in class_counts.items()}


@at_least_100
@given(class_counts_of, st.floats(0.05, 0.95), st.integers(0, 2**32))
def test_split_is_complete_disjoint_and_stratified(
    class_counts: dict[str, int], share: float, seed: int
) -> None:
    base = Source("test", images_of(class_counts))
    parts = split_images(base, {}, share, None, seed)
    for name, count in class_counts.items():
        pieces = [parts[part][name] for part in ("train", "val", "test")]
        assert all(pieces)
        assert sorted([*pieces[0], *pieces[1], *pieces[2]]) == sorted(images_of(class_counts)[name])
        assert len(parts["test"][name]) == min(max(1, round(count * share)), count - 2)


@at_least_100
@given(class_counts_of, st.integers(0, 2**32), st.randoms())
def test_a_new_class_or_another_order_moves_no_image(
    class_counts: dict[str, int], seed: int, random: Random
) -> None:
    images = images_of(class_counts)
    before = split_images(Source("", images), {}, 0.2, None, seed)
    mixed = {name: random.sample(images[name], len(images[name])) for name in reversed(images)}
    mixed["apple_pie"] = [f"/apple_pie/{i}.jpg" for i in range(7)]
    after = split_images(Source("", mixed), {}, 0.2, None, seed)
    for part, images_before in before.items():
        assert {name: after[part][name] for name in images_before} == images_before


@at_least_100
@given(class_counts_of, st.booleans(), st.booleans(), st.floats(0.05, 0.95))
def test_what_is_given_stays_and_what_is_missing_is_taken(
    class_counts: dict[str, int], has_val: bool, has_test: bool, share: float
) -> None:
    """Custom classes have no splits of their own: a share of them goes to each."""
    train, val, test = (
        {name: [f"/{split}/{name}/{i}.jpg" for i in range(n)] for name, n in class_counts.items()}
        for split in ("train", "val", "test")
    )
    custom = {"poha": [f"/custom/poha/{i}.jpg" for i in range(10)], "dal": ["/c/dal/0.jpg"]}
    source = Source("", train, val if has_val else None, test if has_test else None)
    parts = split_images(source, custom, share, None, seed=1)
    for name, paths in train.items():
        joined = {"dal": ["/c/dal/0.jpg"]}.get(name, [])
        found = sorted(path for part in parts.values() for path in part[name])
        given_parts = [*(val[name] if has_val else ()), *(test[name] if has_test else ())]
        assert found == sorted([*paths, *given_parts, *joined])
        assert not has_val or set(val[name]) <= set(parts["val"][name])
        assert not has_test or set(test[name]) <= set(parts["test"][name])
        assert all(parts[part][name] for part in parts)
    assert all(parts[part]["poha"] for part in parts)
    assert sum(len(parts[part]["poha"]) for part in parts) == 10


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


def test_the_split_is_the_one_that_earlier_versions_made(tmp_path: Path) -> None:
    """What is trained again with the same seed is tested on the same images."""
    data = load_food_data(write_tree(tmp_path / "photos", {"dal": 12, "naan": 6}))
    names = [
        " ".join(f"{Path(p).parent.name}/{int(Path(p).stem)}" for p in s) for s in all_paths(data)
    ]
    assert names == [
        "dal/1 dal/4 dal/10 dal/11 dal/8 dal/7 dal/5 dal/0 naan/3 naan/4 naan/2 naan/0",
        "dal/6 dal/3 naan/1",
        "dal/2 dal/9 naan/5",
    ]


# Which classes --------------------------------------------------------------------------------


def one_line(error: DataError) -> str:
    assert "\n" not in str(error)
    return str(error)


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
    with pytest.raises(DataError, match="found only: "):
        load_food_data(base, classes=["pizza", "Pizza"])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"dal": 10}, "found only: "),
        ({"dal": 10, "naan": 2, "idli": 1}, r"idli \(1\), naan \(2\)"),
    ],
)
def test_too_little_data(tmp_path: Path, classes: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_food_data(write_tree(tmp_path, classes))
    assert str(tmp_path) in one_line(caught.value)


def test_no_test_images(tmp_path: Path) -> None:
    root = write_food101(tmp_path / "food-101", {"pizza": (5, 0), "ramen": (5, 0)})
    with pytest.raises(DataError, match="no test images"):
        load_food_data(root)


def test_a_few_small_classes_among_many_are_skipped_and_named(tmp_path: Path) -> None:
    classes = {f"dish_{i:03}": 4 for i in range(40)} | {"dish_007": 2, "dish_021": 1}
    data = load_food_data(write_tree(tmp_path, classes))
    assert len(data.class_to_idx) == 38 and not {"dish_007", "dish_021"} & data.class_to_idx.keys()
    (note,) = (note for note in data.notes if "fewer than 3 training images" in note)
    assert "dish_007, dish_021" in note and note.startswith("warning: skipped 2")
    skipped = {Path(entry["path"]).name for entry in data.audit["skipped"]}
    assert skipped == {"dish_007", "dish_021"}


def test_small_classes_that_are_asked_for_or_many_are_an_error(tmp_path: Path) -> None:
    few = {f"dish_{i:03}": 4 for i in range(20)} | {"naan": 1}
    root = write_tree(tmp_path / "few", few)
    assert len(load_food_data(root).class_to_idx) == 20
    with pytest.raises(DataError, match=r"too few training images in naan \(1\)"):
        load_food_data(root, classes=[*few])
    many = write_tree(tmp_path / "many", {f"dish_{i:03}": 2 + i % 2 for i in range(40)})
    with pytest.raises(DataError, match="too few training images") as caught:
        load_food_data(many)
    assert all(f"dish_{i:03} (2)" in one_line(caught.value) for i in range(0, 40, 2))


def test_a_custom_class_helps_a_small_one(tmp_path: Path) -> None:
    base = write_tree(tmp_path / "base", {"dal": 10, "naan": 10, "idli": 1})
    custom = write_tree(tmp_path / "custom", {"Idli": 5})
    data = load_food_data(base, custom_data_dir=custom)
    assert data.audit["counts"]["idli"] == {"train": 4, "val": 1, "test": 1}


# Duplicates -----------------------------------------------------------------------------------


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
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: read_whole.append(p.name) or read_bytes(p))

    def split(*names: str) -> Split:
        return Split(tuple(str(tmp_path / n) for n in names), np.zeros(len(names), np.int64))

    groups = find_duplicates({"train": split("a", "b", "gone"), "test": split("c", "d")})
    assert groups == [{"train": [str(tmp_path / "a")], "test": [str(tmp_path / "c")]}]
    assert set(read_whole) == {"a", "b", "c"}


# Real photos ----------------------------------------------------------------------------------


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
    assert data.audit["skipped"] == []


def test_real_samosas_join_the_class_of_that_name(shared_dir: Path, tmp_path: Path) -> None:
    base = write_food101(tmp_path / "food-101", {"pizza": (10, 5), "samosa": (10, 5)})
    data = load_food_data(base, custom_data_dir=shared_dir / "data" / "indian_dishes", seed=3)
    assert data.class_to_idx["samosa"] == 1 and len(data.class_to_idx) == 2 + 11
    assert data.audit["counts"]["samosa"] == {"train": 40, "val": 10, "test": 15}
    assert data.notes[-1].split() == ["samosa", "50", "joins", "10", "training", "images"]


def test_uneven_classes_are_said_with_what_can_be_done(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "photos", {"dal": 60, "naan": 20, "dosa": 8})
    note = next(n for n in load_food_data(folder).notes if "uneven classes" in n)
    for part in ("5 training images of dosa and 38 of dal", "--images_per_class"):
        assert part in note
    assert "uneven classes" not in str(load_food_data(folder, images_per_class=20).notes)
