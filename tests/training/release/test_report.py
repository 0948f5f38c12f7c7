"""The report page and the model card: complete, self-contained, and bounded."""

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.support.pages import NASTY, Page, make_history, make_run

from app.ml.activation import ActivationMap
from training.release import report
from training.release.metrics import evaluate, prediction_rows
from training.release.report import write_model_card, write_report


def render(folder: Path, run: dict[str, Any]) -> tuple[str, Page]:
    write_report(folder / "report.html", **run)
    html = (folder / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


def matrix_data(page: Page) -> dict[str, Any]:
    (data,) = (json.loads(text) for text in page.scripts if text.startswith("{"))
    return data


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    return make_run(tmp_path, ["apple_pie", "dal", "dosa", "idli", "jalebi", "pho", "ramen"])


def test_page_holds_every_part(tmp_path: Path, run: dict[str, Any]) -> None:
    _, page = render(tmp_path, run)
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    sections = {"training", "confusions", "classes", "pictures", "calibration", "data", "reproduce"}
    assert sections <= ids
    assert {a["href"] for a in page.all("a")} == {f"#{name}" for name in sections}
    results = run["results"]
    low, high = (f"{100 * x:.1f}%" for x in results["top1_ci95"])
    assert f"{100 * results['top1']:.1f}% correct on 42 test images" in page.text
    assert f"95% interval {low} to {high}" in page.text
    assert f"{100 * results['balanced_accuracy']:.1f}%" in page.text
    for fact in (
        *("best epoch 5", "stopped after epoch 8", "broken.jpg", "the image data is damaged"),
        *("twin_a.jpg", "twin_b.jpg", "8 min 32 s", "2.14.1", run["facts"]["command"]),
        *("no better validation loss for 3 epochs", "1.1 times", "dosa"),
    ):
        assert fact in page.text
    for form in run["facts"]["forms"]:
        assert form["name"] in page.text and form["remark"] in page.text
    assert "9.0 MB" in page.text
    pair = run["results"]["most_confused"][0]
    assert f"{pair['actual']} taken for {pair['predicted']}" in page.text


def test_matrix_data_in_the_page_is_the_matrix(tmp_path: Path, run: dict[str, Any]) -> None:
    data = matrix_data(render(tmp_path, run)[1])
    counts = np.zeros((7, 7), dtype=int)
    for actual, predicted, count in data["cells"]:
        counts[actual, predicted] = count
    assert counts.tolist() == run["results"]["confusion_matrix"]
    assert data["supports"] == counts.sum(axis=1).tolist()
    assert data["classes"] == run["results"]["classes"]


def test_galleries_show_the_right_pictures(tmp_path: Path, run: dict[str, Any]) -> None:
    html, page = render(tmp_path, run)
    wrong = sorted((r for r in run["rows"] if not r["correct"]), key=lambda r: -r["confidence"])
    right = sorted((r for r in run["rows"] if r["correct"]), key=lambda r: r["confidence"])
    expected = [Path(r["file"]).name for r in wrong[:24] + right[:12]]
    assert re.findall(r'class="file" title="[^"]*">([^<]+)<', html) == expected
    assert len(page.all("img")) == len(expected)


def test_each_picture_shows_where_the_model_saw_its_answer(
    tmp_path: Path, run: dict[str, Any]
) -> None:
    asked = []

    def look(class_name: str, _: Image.Image) -> ActivationMap:
        asked.append(class_name)
        return ActivationMap(class_name, [[1.0]] if class_name != "dal" else None, side=0.9)

    html, page = render(tmp_path, {**run, "look": look})
    shown = re.findall(r'class="answer (?:right|wrong)">(\w+)', html.replace("<wbr>", ""))
    assert asked == shown
    heats = [tag for tag in page.all("img") if tag.get("class") == "heat"]
    assert 0 < len(heats) == sum(name != "dal" for name in shown)
    assert 'id="heat"' in html


@pytest.mark.parametrize("look", [None, lambda name, _: ActivationMap(name, None, 1.0, "why")])
def test_without_maps_the_page_does_not_speak_of_them(
    look: Any, tmp_path: Path, run: dict[str, Any]
) -> None:
    _, page = render(tmp_path, {**run, "look": look})
    assert "looked" not in page.text
    assert not [tag for tag in page.all("img") if tag.get("class") == "heat"]


def test_missing_image_is_named_and_nothing_fails(tmp_path: Path, run: dict[str, Any]) -> None:
    wrong = next(row for row in run["rows"] if not row["correct"])
    right = min((row for row in run["rows"] if row["correct"]), key=lambda r: r["confidence"])
    Path(wrong["file"]).unlink()
    Path(right["file"]).write_bytes(b"%PDF-1.7 not a picture")
    wrong["confidence"] = 1.0
    _, page = render(tmp_path, run)
    assert page.text.count("Picture no longer available") == 2
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
    assert matrix_data(page)["classes"][0] == NASTY
    assert "<" not in next(text for text in page.scripts if text.startswith("{"))
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
    write_model_card(tmp_path / "MODEL_CARD.md", results=run["results"], facts=run["facts"])
    card = (tmp_path / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "Never tested, for lack of images: dosa." in card


def test_101_classes_stay_small_and_readable(tmp_path: Path) -> None:
    classes = [f"a_rather_long_dish_name_{i}" for i in range(101)]
    run = make_run(tmp_path, classes, per_class=10)
    _, page = render(tmp_path, run)
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    forms = len(run["facts"]["forms"])
    rows = 101 + 101 + len(run["history"]) + 3 + forms
    assert len(page.all("tr")) == rows + 5  # tables and their heads


@pytest.mark.parametrize("num_classes", [300, 1000])
def test_the_page_does_not_grow_with_the_square_of_the_classes(
    num_classes: int, tmp_path: Path
) -> None:
    """Nor take longer; a matrix of zeros alone would be 2 MB at 1,000 classes."""
    run = make_run(tmp_path, [f"dish_{i}" for i in range(num_classes)], per_class=6)
    began = time.perf_counter()
    html, page = render(tmp_path, run)
    assert time.perf_counter() - began < 20
    assert len(html) < 200_000 + 2_500 * num_classes
    data = matrix_data(page)
    assert sum(count for _, _, count in data["cells"]) == 6 * num_classes


def test_a_page_of_very_many_confusions_says_what_it_leaves_out(
    tmp_path: Path, run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "CELLS_SHOWN", 12)
    _, page = render(tmp_path, run)
    data = matrix_data(page)
    assert len(data["cells"]) == 12
    assert all([i, i] in [cell[:2] for cell in data["cells"]] for i in range(7))
    counts = np.array(run["results"]["confusion_matrix"])
    assert f"{np.count_nonzero(counts) - 12} rarer confusions are left out" in page.text
    shown = [count for i, j, count in data["cells"] if i != j]
    assert min(shown) >= sorted(counts[~np.eye(7, dtype=bool)])[::-1][len(shown) - 1]


def test_long_lists_of_files_are_cut_with_their_number(tmp_path: Path, run: dict[str, Any]) -> None:
    audit = run["facts"]["audit"]
    audit["skipped"] = [{"path": f"{i}.jpg", "reason": "damaged"} for i in range(75_000)]
    audit["duplicates"] = [{"train": [f"a{i}.jpg"], "test": [f"b{i}.jpg"]} for i in range(1_000)]
    html, page = render(tmp_path, run)
    assert len(html) < 600_000
    assert "Skipped: 75,000" in page.text and "and 74,800 more" in page.text
    assert "and 800 more" in page.text


def test_model_card_states_facts_only(tmp_path: Path, run: dict[str, Any]) -> None:
    path = tmp_path / "MODEL_CARD.md"
    write_model_card(path, results=run["results"], facts=run["facts"])
    card = path.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", card, re.MULTILINE)
    assert headings == [
        *("Model", "Data", "License notes", "Metrics", "Intended use", "Limits"),
        "How to reproduce it",
    ]
    assert card.startswith("# mobilenet\\_v2, version 3\n")
    for name, key in (("top-1", "top1"), ("balanced", "balanced_accuracy")):
        assert f"| {name} accuracy | {100 * run['results'][key]:.1f}% | " in card
    assert "| confident answers | 62.5% | 95.7% of them correct |" in card
    assert card.endswith(f"\n    {run['facts']['command']}\n")
    assert not re.search(r"\n\n\n|[ \t]\n|\{[{%#]", card)
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


def test_a_command_stays_a_block_of_code(tmp_path: Path, run: dict[str, Any]) -> None:
    run["facts"]["command"] = "python backend/train_model.py --data_dir 'R&D <new>\n# title'"
    write_model_card(tmp_path / "MODEL_CARD.md", results=run["results"], facts=run["facts"])
    card = (tmp_path / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert card.endswith("    python backend/train_model.py --data_dir 'R&D <new>\n    # title'\n")
