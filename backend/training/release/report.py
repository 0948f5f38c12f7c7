"""The pages of a finished run: report.html and MODEL_CARD.md, from the templates beside this file.

report.html is one self-contained file: report.css, page.js and report.js go into it when rendered.
"""

import functools
import html
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from app.ml.activation import ActivationMap
from training.release.calibration import VerdictShare
from training.release.metrics import ClassScores, PredictionRow, Results, wilson_interval
from training.release.pictures import picture_of, square

PICTURES_SHOWN = 24  # of one kind
HITS_SHOWN = 12
FILES_LISTED = 200  # of those that were skipped, and of duplicates
CELLS_SHOWN = 50_000  # of the confusion matrix, about 600 kB
CHART_BOX = {"width": 360, "height": 210, "left": 58, "right": 350, "top": 10, "bottom": 184}
SPLITS = ("train", "val", "test")

ClassLook = Callable[[str, Image.Image], ActivationMap]  # where a network looked for a class


class FormFacts(TypedDict):
    """A form of the model; None where it is not released. remark: how it compares, or why not."""

    name: str
    bytes: int | None
    test_top1: float | None
    test_ece: float | None
    remark: str


class ReportFacts(TypedDict):
    """What the report and the model card say beside the numbers.

    best_epoch: 0 for a mean of versions. stopped_epoch: None if every epoch was trained.
    verdicts: split -> verdict -> shares. timings: seconds.
    """

    model_name: str
    version: int
    best_epoch: int
    stopped_epoch: int | None
    stop_reason: str
    config: dict[str, Any]
    classes: list[str]
    verdicts: dict[str, dict[str, VerdictShare]]
    forms: list[FormFacts]
    audit: dict[str, Any]
    versions: dict[str, str]
    timings: dict[str, float]
    command: str
    created: str


class Matrix(TypedDict):
    """The cells of a confusion matrix that are not zero: actual, predicted, count."""

    supports: list[int]
    cells: list[list[int]]
    num_hidden: int


@dataclass(frozen=True)
class Chart:
    """A chart by epoch. series: key of an epoch's record -> its name; the first is drawn faint
    where there are two. A loss or a rate is read against zero, an accuracy needs its room."""

    title: str
    series: Mapping[str, str]
    number: str
    tick: str
    from_zero: bool


CHARTS = (
    Chart("Loss", {"train_loss": "train", "val_loss": "validation"}, "{:.3g}", "{:.3g}", True),
    Chart("Accuracy", {"train_acc": "train", "val_acc": "validation"}, "{:.1%}", "{:.0%}", False),
    Chart("Learning rate", {"learning_rate": "learning rate"}, "{:.3g}", "{:.3g}", True),
)


def write_report(
    path: Path,
    *,
    results: Results,
    rows: list[PredictionRow],
    history: list[dict[str, float]],
    facts: ReportFacts,
    look: ClassLook | None = None,
) -> None:
    """Write the whole run as one self-contained page that needs no network.

    history: one record per epoch. look: says where the network looked. A picture that is no longer
    available is shown as missing.
    """
    mistakes = sorted((r for r in rows if not r["correct"]), key=lambda r: -r["confidence"])
    hits = sorted((r for r in rows if r["correct"]), key=lambda r: r["confidence"])
    galleries = {
        "mistakes": [with_thumbnail(row, look) for row in mistakes[:PICTURES_SHOWN]],
        "hits": [with_thumbnail(row, look) for row in hits[:HITS_SHOWN]],
    }
    write_page(
        path,
        "report.html",
        results=results,
        matrix=_matrix(results),
        facts=facts,
        history=history,
        charts=[_placed(chart, history) for chart in CHARTS if history],
        chart_box=CHART_BOX,
        marks={"best": facts["best_epoch"], "stopped": facts["stopped_epoch"]},
        classes_by_f1=sorted(results["per_class"], key=_f1_or_last),
        typical_class=_typical_class(results),
        **galleries,
        num_mistakes=len(mistakes),
        has_heat=any(row["heat"] for rows in galleries.values() for row in rows),
        audit=_audit_summary(facts["audit"]),
        listed=FILES_LISTED,
        only_drawn=_only_drawn(facts),
    )


def write_model_card(path: Path, *, results: Results, facts: ReportFacts) -> None:
    """Write MODEL_CARD.md from the recorded facts; what was not recorded is not claimed."""
    audit, only_drawn = _audit_summary(facts["audit"]), _only_drawn(facts)
    write_page(
        path, "model_card.md", results=results, facts=facts, audit=audit, only_drawn=only_drawn
    )


def write_page(path: Path, template: str, **values: object) -> None:
    """Render a template into a file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "percent": _percent,
        "points": _points,
        "seconds": _seconds,
        "megabytes": _megabytes,
        "breakable": _breakable,
        "md": _markdown,
    }
    environment.filters |= filters
    page = environment.get_template(template).render(**values)
    # backslashreplace: a file name may hold bytes that are not text
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def with_thumbnail(row: Mapping[str, Any], look: ClassLook | None = None) -> dict[str, Any]:
    """Add the name of the row's `file`, a small picture of it, and where the network looked to give
    its answer."""
    for_answer = functools.partial(look, row["predicted"]) if look else None
    picture = picture_of(row["file"], square, for_answer)
    return {**row, "file_name": Path(row["file"]).name, **picture}


def _matrix(results: Results) -> Matrix:
    """List the diagonal and the most frequent confusions; the rarest go if there are many."""
    counts = np.array(results["confusion_matrix"], dtype=np.int32)
    rows, columns = np.nonzero(counts)
    order = np.lexsort((-counts[rows, columns], rows != columns))[:CELLS_SHOWN]
    rows, columns = rows[order], columns[order]
    return {
        "supports": counts.sum(axis=1).tolist(),
        "cells": np.stack([rows, columns, counts[rows, columns]], axis=1).tolist(),
        "num_hidden": int(np.count_nonzero(counts)) - len(order),
    }


def _placed(chart: Chart, history: list[dict[str, float]]) -> dict[str, Any]:
    """Place the chart's lines and ticks in the coordinates of CHART_BOX."""
    from matplotlib.ticker import MaxNLocator

    values = [record[key] for key in chart.series for record in history]
    lowest = 0.0 if chart.from_zero else min(values)
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(lowest, max(values))
    first, last = int(history[0]["epoch"]), int(history[-1]["epoch"])
    epoch_ticks = MaxNLocator(6, integer=True).tick_values(first, last)

    def place_x(epoch: float) -> float:
        share = (epoch - first) / max(last - first, 1)
        return _between(CHART_BOX["left"], CHART_BOX["right"], share)

    def place_y(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return _between(CHART_BOX["bottom"], CHART_BOX["top"], float(share))

    return {
        "title": chart.title,
        "x_ticks": [(place_x(tick), int(tick)) for tick in epoch_ticks if first <= tick <= last],
        "y_ticks": [(place_y(tick), chart.tick.format(tick)) for tick in ticks],
        "x": {record["epoch"]: place_x(record["epoch"]) for record in history},
        "series": [
            {
                "name": name,
                "style": "faint" if key.startswith("train") else "strong",
                "y": {record["epoch"]: place_y(record[key]) for record in history},
                "text": {record["epoch"]: chart.number.format(record[key]) for record in history},
            }
            for key, name in chart.series.items()
        ],
    }


def _between(start: float, end: float, share: float) -> float:
    return round(start + (end - start) * share, 1)


def _f1_or_last(scores: ClassScores) -> float:
    return 2.0 if scores["f1"] is None else scores["f1"]


def _typical_class(results: Results) -> dict[str, float]:
    """Return the median class size and the 95% margin of a recall near one half at that size."""
    supports = [scores["support"] for scores in results["per_class"] if scores["support"]]
    support = int(statistics.median_low(supports))
    low, high = wilson_interval(support // 2, support)
    return {"support": support, "recall_margin": (high - low) / 2}


def _audit_summary(audit: Mapping[str, Any]) -> dict[str, Any]:
    counts = audit["counts"]
    train_counts = [split_counts["train"] for split_counts in counts.values()]
    smallest, largest = min(train_counts), max(train_counts)
    return {
        "custom": [],
        **audit,
        "totals": {split: sum(c[split] for c in counts.values()) for split in SPLITS},
        "largest_class": max(sum(c[split] for split in SPLITS) for c in counts.values()),
        "smallest_train": smallest,
        "largest_train": largest,
        "imbalance": largest / smallest if smallest else None,
    }


def _only_drawn(facts: ReportFacts) -> bool:
    return bool(facts["config"].get("sample")) and not facts["audit"].get("custom")


# Filters of the templates ---------------------------------------------------------------------


def _percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f}%"


def _points(change: float) -> str:
    """Format a difference of two shares in points, with a sign that is as wide as a digit."""
    sign = "+" if change > 0 else "\N{MINUS SIGN}" if change < 0 else "\N{PLUS-MINUS SIGN}"
    return f"{sign}{abs(100 * change):.1f}"


def _seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    hours, minutes = divmod(round(value) // 60, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {round(value) % 60:02} s"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f} MB"


def _breakable(name: str) -> Markup:
    """Escape a name and let the browser break it after underscores."""
    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


def _markdown(value: object) -> Markup:
    """Keep a name from becoming markup: HTML escaped, Markdown's own marks behind a backslash."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return Markup(re.sub(r"([\\`*_\[\]|#])", r"\\\1", text))
