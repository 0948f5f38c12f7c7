"""The label audit: what it lists and in which order; its table and page, and the way back through
--labels."""

import csv
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.support import standin
from tests.support.pages import Page
from tests.support.photo_folders import write_tree
from tests.support.runs import arguments, draw_photos
from tests.support.web_page import CHROMIUM

import train_model
from app.ml.activation import SpatialNetwork
from training.commands.audit import Photos, find

CLASSES = ["dal", "naan", "pho"]
NASTY = "a&b, 'c' <b>.jpg"


def some_photos() -> Photos:
    """Three classes: photo 4 is of another, 7 is in the test too, 9 has two labels, 29 is odd."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 30)
    centers = rng.gamma(1.0, 1.0, (3, 64))
    pooled = np.abs(centers[labels] + rng.normal(0, 0.6, (90, 64)))
    pooled[4] = np.abs(centers[1] + rng.normal(0, 0.6, 64))
    pooled[20], pooled[40] = pooled[7], pooled[9]
    pooled[29] = np.eye(64)[0]
    splits = ["train"] * 90
    splits[20] = "test"
    names = [f"{CLASSES[label]}/{i}.jpg" for i, label in enumerate(labels)]
    hashes = rng.random((90, 64)) < 0.5
    return Photos(names, names, labels, splits, pooled, hashes)


def test_each_kind_is_found_the_most_certain_first() -> None:
    found = [f for f in find(some_photos(), CLASSES, seed=0) if f.photo in (4, 7, 9, 20, 29, 40)]
    kinds = [(f.photo, f.kind, f.suggestion, f.twins) for f in found]
    assert sorted(kinds[:2]) == [(9, "conflict", "naan", [40]), (40, "conflict", "dal", [9])]
    assert kinds[2:] == [
        (4, "label", "naan", []),
        (29, found[3].kind, found[3].suggestion, []),
        (7, "twice", "drop", [20]),  # the copy in the test stays
    ]
    assert "resembles no dish of the data" in found[3].reasons
    assert next(iter(found[2].likely)) == "naan"


# The command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in three colors, one of them in the wrong folder."""
    root = draw_photos(tmp_path_factory.mktemp("noisy") / "photos", per_class=20)
    (root / "green" / "03.jpg").rename(root / "red" / NASTY)
    return root


@pytest.fixture(scope="module")
def audited(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audited")
    assert audit(photos, folder) == 0
    return folder / "models"


def audit(photos: Path, folder: Path, *more: str) -> int:
    with standin.registered():
        return train_model.main(arguments(photos, folder, "--audit", *more))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "audit.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_labels(file: Path, labels: dict[str, str]) -> str:
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([("path", "label"), *labels.items()])
    return str(file)


def test_the_page_is_one_file_in_which_names_stay_text(audited: Path) -> None:
    page = Page((audited / "audit.html").read_text(encoding="utf-8"))
    cards = [tag for tag in page.all("li") if tag.get("data-name")]
    assert [card["data-name"] for card in cards] == [row["path"] for row in rows(audited)]
    assert f"red/{NASTY}" in page.text
    sources = [tag["src"] for tag in page.all("img")]
    assert sources and all(source and source.startswith("data:image/") for source in sources)
    assert not page.all("link")


def test_the_page_shows_where_a_photo_looks_like_another_dish(audited: Path) -> None:
    page = Page((audited / "audit.html").read_text(encoding="utf-8"))
    heats = [tag["src"] for tag in page.all("img") if tag.get("class") == "heat"]
    doubted = [row for row in rows(audited) if row["kind"] in ("label", "conflict")]
    assert len(heats) == len(doubted) and len(set(heats)) > 1
    assert [tag["id"] for tag in page.all("input") if tag.get("type") == "checkbox"] == ["heat"]


def test_a_network_without_places_leaves_the_page_without_heat(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpatialNetwork, "fits", lambda *_: False)
    assert audit(photos, tmp_path) == 0
    html = (tmp_path / "models" / "audit.html").read_text(encoding="utf-8")
    assert rows(tmp_path / "models") and 'id="heat"' not in html and 'class="heat"' not in html


def test_what_was_decided_is_not_asked_again(photos: Path, audited: Path, tmp_path: Path) -> None:
    first, second = (row["path"] for row in rows(audited)[:2])
    for name in (first, str(photos / first)):
        labels = {name: first.split("/")[0]}  # is right, somebody says
        assert audit(photos, tmp_path, "--labels", write_labels(tmp_path / "l.csv", labels)) == 0
        left = {row["path"] for row in rows(tmp_path / "models")}
        assert first not in left and second in left


def test_small_classes_are_named_and_bad_labels_refused(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    few = tmp_path / "few"
    shutil.copytree(photos, few)
    for path in sorted((few / "sky").iterdir())[3:]:
        path.unlink()
    assert audit(few, tmp_path) == 0
    assert "not judged, too few photos: sky (3)" in caplog.text
    wrong = write_labels(tmp_path / "l.csv", {"red/07.jpg": "blue"})
    assert audit(few, tmp_path, "--labels", wrong) == 1
    assert "no such class: blue" in caplog.records[-1].message


def test_a_class_called_drop_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tree(tmp_path / "photos", {"dal": 6, "drop": 6})
    assert audit(tmp_path / "photos", tmp_path) == 1
    assert "a class is called 'drop'" in caplog.text


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")
def test_a_person_decides_by_keyboard_and_the_file_is_taken(
    photos: Path, audited: Path, tmp_path: Path
) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((audited / "audit.html").as_uri())
        for key in ("ArrowRight", "Enter", "d", "ArrowLeft", "ArrowLeft", "u", "k"):
            page.keyboard.press(key)
        heat = page.locator(".heat").first
        assert not heat.is_visible()
        page.keyboard.press("w")
        assert heat.is_visible()
        page.locator(".seen", has=heat).first.hover()  # which shows the photo for a moment
        assert not heat.is_visible()
        with page.expect_download() as download:
            page.click("#save")
        download.value.save_as(tmp_path / "labels.csv")
        page.reload()
        assert page.inner_text("#progress").startswith("2 of")
        browser.close()
    assert errors == []
    with (tmp_path / "labels.csv").open(newline="", encoding="utf-8") as file:
        saved = dict(csv.reader(file))
    first, second = rows(audited)[:2]
    assert saved == {"path": "label", first["path"]: first["label"], second["path"]: "drop"}
    assert audit(photos, tmp_path, "--labels", str(tmp_path / "labels.csv")) == 0
