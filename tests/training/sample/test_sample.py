"""The drawn set: Food-101's layout, the same pictures for a seed, whole or not there at all."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import Food101

from training.sample import generate
from training.sample.dishes import CLUTTER, DISHES, PIECES, View
from training.sample.generate import CLASSES, draw_dish, draw_sample

COUNTS = {"images_per_class": 3, "test_per_class": 1}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_sample(tmp_path_factory.mktemp("sample"), seed=7, **COUNTS)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Stand-in drawings, for tests about files: what was drawn, in order."""
    calls: list[tuple[str, int, int]] = []

    def draw(name: str, seed: int, index: int) -> tuple[Image.Image, int]:
        calls.append((name, seed, index))
        shade = (17 * CLASSES.index(name), 9 * index % 256, seed % 256)
        return Image.new("RGB", (32, 24), shade), 80

    monkeypatch.setattr(generate, "draw_dish", draw)
    return calls


def histograms(numbers: range) -> NDArray[np.float64]:
    """Shares of 64 colors in each picture, (classes, images, colors)."""
    shares = []
    for name in CLASSES:
        for number in numbers:
            pixels = np.asarray(draw_dish(name, 0, number)[0].resize((64, 64))) // 64
            shares.append(np.bincount((pixels @ [16, 4, 1]).ravel(), minlength=64) / 64**2)
    return np.sqrt(shares).reshape(len(CLASSES), len(numbers), 64)


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_classes_are_food_101_names_in_order() -> None:
    assert len(CLASSES) == 10
    assert list(CLASSES) == sorted(set(CLASSES))


def test_torchvision_reads_it_as_food_101(drawn: Path) -> None:
    train, test = (Food101(drawn.parent, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (20, 10)
    assert train.classes == test.classes == list(CLASSES)
    for picture, label in (*train, *test):
        assert picture.mode == "RGB"
        assert 150 < max(picture.size) <= 512
        assert 0 <= label < 10


def test_every_picture_is_a_jpeg_that_the_lists_name_once(drawn: Path) -> None:
    lists = {
        split: (drawn / "meta" / f"{split}.txt").read_text().split() for split in ("train", "test")
    }
    for split, ids in lists.items():
        grouped = json.loads((drawn / "meta" / f"{split}.json").read_text())
        assert [i for name in CLASSES for i in grouped[name]] == ids
    files = {
        path.relative_to(drawn / "images").with_suffix("").as_posix()
        for path in drawn.glob("images/*/*")
    }
    assert sorted(lists["train"] + lists["test"]) == sorted(files)
    for path in drawn.glob("images/*/*"):
        with Image.open(path) as picture:
            assert picture.format == "JPEG"
    labels = (drawn / "meta" / "labels.txt").read_text().splitlines()
    assert labels[1] == "Cup cakes" and len(labels) == 10
    assert (drawn / "meta" / "classes.txt").read_text().split() == list(CLASSES)


def test_it_says_in_words_that_it_is_drawn(
    tmp_path: Path, quick: list[tuple[str, int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        folder = draw_sample(tmp_path, **COUNTS)
    assert "not photographs" in (folder / "DRAWN.txt").read_text()
    assert "30 pictures" in caplog.text and "not photographs" in caplog.text
    assert len(quick) == 30


@pytest.mark.parametrize("name", ["greek_salad", "ice_cream", "pizza"])
def test_a_picture_depends_on_seed_class_and_index_alone(name: str) -> None:
    first, again = draw_dish(name, 1, 5), draw_dish(name, 1, 5)
    assert first[0].tobytes() == again[0].tobytes() and first[1] == again[1]
    assert 35 <= first[1] <= 95
    for seed, index in ((2, 5), (1, 6)):
        assert draw_dish(name, seed, index)[0].tobytes() != first[0].tobytes()


@pytest.mark.parametrize("view", [view for views in DISHES.values() for view in views], ids=str)
def test_every_view_of_a_dish_draws_something(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DISHES, "pizza", [view])
    picture, _ = draw_dish("pizza", 3, 0)
    assert len(picture.getcolors(512 * 512) or ()) > 1000


def test_every_name_in_the_tables_is_a_piece_and_every_piece_is_used() -> None:
    views = [view for views in DISHES.values() for view in views]
    rows = [CLUTTER, *(row for view in views for row in view.rows)]
    named = [*(row.pieces for row in rows), *(view.vessels for view in views)]
    assert {name for names in named for name in names.split()} == PIECES.keys()


@pytest.mark.slow
def test_colors_alone_do_not_tell_the_dishes_apart() -> None:
    """A nearest centroid on color histograms, where chance is 0.1 and a network reaches 0.9."""
    train, test = (histograms(range(*numbers)) for numbers in ((0, 8), (8, 12)))
    centroids = train.mean(axis=1)  # (classes, colors)
    distances = np.linalg.norm(test[:, :, None] - centroids, axis=-1)  # (classes, images, classes)
    found = distances.argmin(axis=-1) == np.arange(len(CLASSES))[:, None]
    assert found.mean() < 0.4


def test_several_processes_draw_the_same_bytes(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "SHARE_FROM", 1)
    monkeypatch.setattr(generate.os, "cpu_count", lambda: 2)
    (tmp_path / "training.py").write_text("raise SystemExit('not ours')\n")
    monkeypatch.chdir(tmp_path)  # no process imports from here
    assert contents(draw_sample(tmp_path / "set", seed=7, **COUNTS)) == contents(drawn)


def test_a_process_that_cannot_draw_says_why_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "SHARE_FROM", 1)
    monkeypatch.setattr(generate.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(generate, "draw_share", lambda images, *_: shutil.rmtree(images))
    with pytest.raises(OSError, match=r"^the sample could not be drawn into .*: FileNotFoundError"):
        draw_sample(tmp_path, **COUNTS)
    assert list(tmp_path.iterdir()) == []


def test_a_complete_set_is_used_again(tmp_path: Path, quick: list[tuple[str, int, int]]) -> None:
    before = contents(draw_sample(tmp_path, **COUNTS))
    quick.clear()
    assert contents(draw_sample(tmp_path, **COUNTS)) == before
    assert quick == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"images_per_class": 4}, {"test_per_class": 2}], ids=str
)
def test_other_settings_draw_anew(tmp_path: Path, other: dict[str, int]) -> None:
    before = contents(draw_sample(tmp_path, **COUNTS))
    after = contents(draw_sample(tmp_path, **{**COUNTS, **other}))
    pictures = [name for name in after if name.endswith(".jpg")]
    assert after != before
    assert len(pictures) == 10 * other.get("images_per_class", 3)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("file", ["images/pizza/1000.jpg", "meta/train.json", "meta/labels.txt"])
@pytest.mark.parametrize("damage", ["cut short", "byte flipped", "removed"])
def test_a_damaged_set_is_drawn_anew(tmp_path: Path, file: str, damage: str) -> None:
    folder = draw_sample(tmp_path, **COUNTS)
    before, victim = contents(folder), folder / file
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 0xFF
    victim.unlink()
    if damage != "removed":
        victim.write_bytes(data if damage == "byte flipped" else data[: len(data) // 2])
    assert contents(draw_sample(tmp_path, **COUNTS)) == before
    assert [path.name for path in tmp_path.iterdir()] == ["food-101"]


@pytest.mark.usefixtures("quick")
def test_a_damaged_note_makes_the_set_drawn_anew(tmp_path: Path) -> None:
    note = draw_sample(tmp_path, **COUNTS) / "DRAWN.txt"
    whole = note.read_bytes()
    note.write_bytes(whole[:-9] + b"\xff")
    draw_sample(tmp_path, **COUNTS)
    assert note.read_bytes() == whole


def test_food_101_itself_is_never_replaced(
    tmp_path: Path, quick: list[tuple[str, int, int]]
) -> None:
    photo = tmp_path / "food-101" / "images" / "pizza" / "1.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"a real photo")
    with pytest.raises(FileExistsError, match=r"food-101 holds pictures .* choose another"):
        draw_sample(tmp_path, **COUNTS)
    assert photo.read_bytes() == b"a real photo" and quick == []


def test_a_failure_leaves_the_old_set_and_nothing_else(
    tmp_path: Path, quick: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(draw_sample(tmp_path, **COUNTS))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(generate.json, "dumps", full)
    with pytest.raises(OSError, match="No space left"):
        draw_sample(tmp_path, seed=9, **COUNTS)
    assert contents(tmp_path / "food-101") == before
    assert [path.name for path in tmp_path.iterdir()] == ["food-101"]
    assert quick


@pytest.mark.parametrize("counts", [(3, 0), (3, 3), (1, 1), (0, -1)])
def test_counts_that_leave_a_split_empty_are_refused(
    tmp_path: Path, counts: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match=f"test_per_class is {counts[1]} of {counts[0]}"):
        draw_sample(tmp_path, 42, *counts)
    assert list(tmp_path.iterdir()) == []
