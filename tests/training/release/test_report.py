import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.release.metrics import evaluate, prediction_rows
from training.release.report import write_confusion_matrix, write_model_card, write_report

VOID_TAGS = {
    "meta",
    "link",
    "img",
    "input",
    "br",
    "hr",
    "wbr",
    "line",
    "circle",
    "polyline",
    "rect",
}
NASTY = "<script>alert('x')</script> & \"co\" {{ 7 * 7 }} | *a*"


class Page(HTMLParser):
    """What a browser would see: balanced tags, attributes, visible text, embedded data."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts = "", [""]
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not self.open or self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def make_run(folder: Path, classes: list[str], per_class: int = 6) -> dict[str, Any]:
    """A run with random answers over flat-coloured pictures; half of the images are recognised."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(classes)), per_class)
    logits = random.normal(size=(len(labels), len(classes)))
    logits[np.arange(len(labels)), labels] += 2.0
    paths = []
    for i in range(len(labels)):
        paths.append(folder / f"image_{i}.jpg")
        if i < 60:
            Image.new("RGB", (40, 30), (4 * i, 120, 90)).save(paths[-1])
    rows = prediction_rows(paths, labels, logits, classes, 1.3)
    results = evaluate(logits, labels, classes, temperature=1.3)
    return {
        "results": results,
        "rows": rows,
        "history": make_history(8),
        "facts": make_facts(classes),
    }


def make_history(epochs: int) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "train_loss": 2.0 / epoch,
            "train_acc": 1 - 0.5 / epoch,
            "val_loss": 0.4 + 1.5 / epoch,
            "val_acc": 0.9 - 0.5 / epoch,
            "learning_rate": 0.001,
            "seconds": 61.0,
            "images_per_second": 80.0,
        }
        for epoch in range(1, epochs + 1)
    ]


def make_facts(classes: list[str]) -> dict[str, Any]:
    return {
        "model_name": "mobilenet_v2",
        "version": 3,
        "best_epoch": 5,
        "stopped_epoch": 8,
        "stop_reason": "Stopped early: no better validation loss for 3 epochs.",
        "config": {"epochs": 20, "weights": "imagenet", "sample": False, "seed": 42},
        "classes": classes,
        "verdicts": {
            split: {
                "confident": {"share": 0.625, "accuracy": 0.957},
                "unsure": {"share": 0.375, "accuracy": 0.5},
                "not_food": {"share": 0.0, "accuracy": None},
            }
            for split in ("validation", "test")
        },
        "audit": {
            "source": "Food-101 in data/food-101",
            "counts": {
                name: {"train": 40 + i, "val": 10, "test": 6} for i, name in enumerate(classes)
            },
            "skipped": [{"path": "broken.jpg", "reason": "the image data is damaged"}],
            "duplicates": [{"train": ["twin_a.jpg"], "val": [], "test": ["twin_b.jpg"]}],
            "custom": [{"class": "dosa", "images": 50, "joins": 0}],
        },
        "versions": {"torch": "2.14.1"},
        "timings": {"training": 512.0},
        "command": "python backend/train_model.py --epochs 20",
        "created": "2026-11-23T10:00:00+00:00",
    }


def render(folder: Path, run: dict[str, Any]) -> tuple[str, Page]:
    write_report(folder / "report.html", **run)
    html = (folder / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    return make_run(tmp_path, ["apple_pie", "dal", "dosa", "idli", "jalebi", "pho", "ramen"])


def test_page_holds_every_part(tmp_path: Path, run: dict[str, Any]) -> None:
    _, page = render(tmp_path, run)
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    sections = {"training", "confusions", "classes", "pictures", "calibration", "data", "repeat"}
    assert sections <= ids
    assert {a["href"] for a in page.all("a")} == {f"#{name}" for name in sections}
    top1 = f"{100 * run['results']['top1']:.1f}\N{NO-BREAK SPACE}%"
    low, high = (f"{100 * x:.1f}\N{NO-BREAK SPACE}%" for x in run["results"]["top1_ci95"])
    assert top1 in page.text
    assert f"95 % interval {low} to {high}" in page.text
    for fact in (
        *("best epoch 5", "stopped after epoch 8", "broken.jpg", "the image data is damaged"),
        *("twin_a.jpg", "twin_b.jpg", "8 min 32 s", "2.14.1", run["facts"]["command"]),
        *("no better validation loss for 3 epochs", "1.1 times", "dosa"),
    ):
        assert fact in page.text
    pair = run["results"]["most_confused"][0]
    assert f"{pair['actual']} taken for {pair['predicted']}" in page.text


def test_matrix_data_in_the_page_is_the_matrix(tmp_path: Path, run: dict[str, Any]) -> None:
    _, page = render(tmp_path, run)
    (data,) = (json.loads(text) for text in page.scripts if text.startswith('{"classes"'))
    assert data["counts"] == run["results"]["confusion_matrix"]
    assert data["classes"] == run["results"]["classes"]


def test_galleries_show_the_right_pictures(tmp_path: Path, run: dict[str, Any]) -> None:
    html, page = render(tmp_path, run)
    wrong = sorted((r for r in run["rows"] if not r["correct"]), key=lambda r: -r["confidence"])
    right = sorted((r for r in run["rows"] if r["correct"]), key=lambda r: r["confidence"])
    expected = [Path(r["file"]).name for r in wrong[:24] + right[:12]]
    assert re.findall(r'class="file" title="[^"]*">([^<]+)<', html) == expected
    assert len(page.all("img")) == len(expected)


def test_missing_image_is_named_and_nothing_fails(tmp_path: Path, run: dict[str, Any]) -> None:
    wrong = next(row for row in run["rows"] if not row["correct"])
    right = min((row for row in run["rows"] if row["correct"]), key=lambda r: r["confidence"])
    Path(wrong["file"]).unlink()
    Path(right["file"]).write_bytes(b"%PDF-1.7 not a picture")
    wrong["confidence"] = 1.0
    _, page = render(tmp_path, run)
    assert page.text.count("Image can no longer be read") == 2
    assert Path(wrong["file"]).name in page.text
    assert Path(right["file"]).name in page.text


def test_names_stay_text(tmp_path: Path) -> None:
    run = make_run(tmp_path, [NASTY, "dal", "dosa\udcff"])
    run["facts"]["audit"]["skipped"] = [{"path": NASTY, "reason": NASTY}]
    run["facts"]["command"] = run["facts"]["stop_reason"] = run["facts"]["model_name"] = NASTY
    run["rows"][0]["file"] = str(tmp_path / NASTY.replace("/", ""))
    html, page = render(tmp_path, run)
    assert len(page.all("script")) == 2  # the matrix data and the page's own script
    assert page.text.count(NASTY) >= 6
    assert "dosa\\udcff" in page.text
    data = next(text for text in page.scripts if text.startswith('{"classes"'))
    assert json.loads(data)["classes"][0] == NASTY
    assert "<" not in data
    assert "<script>alert" not in html


def test_page_loads_nothing_from_anywhere(tmp_path: Path, run: dict[str, Any]) -> None:
    html, page = render(tmp_path, run)
    assert "http:" not in html
    assert "https:" not in html
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", html)
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        assert (attributes.get("src") or "data:image/jpeg;").startswith(
            "data:image/jpeg;base64,"[:16]
        )
        assert (attributes.get("href") or "#").startswith("#")


def test_drawn_sample_is_called_drawn(tmp_path: Path, run: dict[str, Any]) -> None:
    assert "drawn sample plates" not in render(tmp_path, run)[1].text
    run["facts"]["config"]["sample"] = True
    assert "drawn sample plates" not in render(tmp_path, run)[1].text  # there are own photos too
    run["facts"]["audit"]["custom"] = []
    assert "drawn sample plates" in render(tmp_path, run)[1].text


def test_small_and_lopsided_runs(tmp_path: Path) -> None:
    """Two classes, one of them without test or training images, one epoch, no mistake at all."""
    run = make_run(tmp_path, ["dal", "dosa"], per_class=1)
    logits, classes = np.array([[5.0, 0.0]]), ["dal", "dosa"]
    run["results"] = evaluate(logits, np.array([0]), classes)
    run["rows"] = prediction_rows([tmp_path / "image_0.jpg"], np.array([0]), logits, classes)
    run["history"] = make_history(1)
    run["facts"] |= {"best_epoch": 1, "stopped_epoch": None}
    run["facts"]["audit"] |= {"skipped": [], "duplicates": []}
    run["facts"]["audit"]["counts"]["dosa"]["train"] = 0
    del run["facts"]["audit"]["custom"]
    _, page = render(tmp_path, run)
    for sentence in (
        *("It made no mistake.", "No test image was mistaken.", "Every file could be used."),
        *("No picture is in two splits.", "At least one class has no training image."),
    ):
        assert sentence in page.text
    assert "Top-5" not in page.text
    assert "stopped after" not in page.text
    write_confusion_matrix(run["results"], tmp_path / "matrix.png")
    write_model_card(tmp_path / "MODEL_CARD.md", results=run["results"], facts=run["facts"])
    card = (tmp_path / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "Never tested, for want of images: dosa." in card


def test_101_classes_stay_small_and_readable(tmp_path: Path) -> None:
    classes = [f"a_rather_long_dish_name_{i}" for i in range(101)]
    run = make_run(tmp_path, classes, per_class=10)
    _, page = render(tmp_path, run)
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    assert len(page.all("tr")) == 101 + 101 + len(run["history"]) + 3 + 4  # tables and their heads
    write_confusion_matrix(run["results"], tmp_path / "matrix.png")
    with Image.open(tmp_path / "matrix.png") as image:
        width, height = image.size
        image.load()
    assert width == height
    assert 101 * 30 <= width <= 5000  # 30 pixels a row hold a name that can be read


def test_dollars_in_names_are_no_formula(tmp_path: Path) -> None:
    names = ["$\\frac$", "menu_$5_to_$10", "pizza"]
    results = evaluate(5.0 * np.eye(3), np.arange(3), names)
    write_confusion_matrix(results, tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").stat().st_size


def test_matrix_png_of_ten_classes(tmp_path: Path) -> None:
    labels = np.arange(100) % 10
    logits = 5.0 * np.eye(10)[labels]
    logits[0, 3] = 9.0  # class 0 taken for class 3, once
    results = evaluate(logits, labels, [f"dish_{i}" for i in range(10)])
    write_confusion_matrix(results, tmp_path / "matrix.png")
    with Image.open(tmp_path / "matrix.png") as image:
        assert image.format == "PNG"
        assert image.size[0] == image.size[1]
        assert 900 <= image.size[0] <= 1600
        pixels = np.asarray(image.convert("RGB")).astype(int)
    red, blue = pixels[..., 0], pixels[..., 2]
    cell = (0.6 * 130) ** 2
    assert (blue - red > 60).sum() == pytest.approx(10 * cell, rel=0.15)  # the diagonal
    assert (red - blue > 60).sum() == pytest.approx(cell, rel=0.15)  # the one mistake


def test_model_card_states_facts_only(tmp_path: Path, run: dict[str, Any]) -> None:
    path = tmp_path / "MODEL_CARD.md"
    write_model_card(path, results=run["results"], facts=run["facts"])
    card = path.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", card, re.MULTILINE)
    assert headings == [
        *("Model", "Data", "Licence notes", "Metrics", "Intended use", "Limits"),
        "How to repeat it",
    ]
    assert card.startswith("# mobilenet\\_v2, version 3\n")
    assert f"| top-1 accuracy | {100 * run['results']['top1']:.1f}" in card
    assert "Foodspotting" in card
    assert "Best epoch: 5 of 20 asked for, stopped after epoch 8" in card
    assert "301 train, 70 val, 42 test" in card

    run["facts"]["audit"]["source"] = "Image folders in my_photos"
    write_model_card(path, results=run["results"], facts=run["facts"])
    assert "Foodspotting" not in path.read_text(encoding="utf-8")

    run["facts"]["config"]["sample"] = True
    write_model_card(path, results=run["results"], facts=run["facts"])
    assert "say nothing about photos" not in path.read_text(encoding="utf-8")  # own photos too
    run["facts"]["audit"]["custom"] = []
    write_model_card(path, results=run["results"], facts=run["facts"])
    assert "say nothing about photos" in path.read_text(encoding="utf-8")


def test_model_card_keeps_names_text(tmp_path: Path) -> None:
    run = make_run(tmp_path, [NASTY, "line\nbreak", "dosa"])
    write_model_card(tmp_path / "MODEL_CARD.md", results=run["results"], facts=run["facts"])
    card = (tmp_path / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "<script>" not in card
    assert "\\*a\\*" in card
    assert "\\| " in card
    assert "line break" in card
