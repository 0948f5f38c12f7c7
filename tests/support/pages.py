"""Finished runs that were made up, and what a browser would see of their pages."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.release.metrics import evaluate, prediction_rows

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
    """A run with random answers over flat-colored pictures; half of the images are recognised."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(classes)), per_class)
    logits = rng.normal(size=(len(labels), len(classes)))
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
        "forms": [
            {"name": "torch", "bytes": 9_000_000, "test_top1": 0.8, "test_ece": 0.05, "remark": ""},
            {
                **{"name": "int8", "bytes": None, "test_top1": None, "test_ece": None},
                "remark": "not released: too much <lost>",
            },
        ],
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
