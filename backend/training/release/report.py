"""The pictures and pages of a finished run: confusion matrix PNG, report.html, MODEL_CARD.md."""

import base64
import html
import io
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import ImageOps

from app.ml.preprocessing import ImageError, load_image
from training.release.metrics import wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

THUMBNAIL_SIZE = 180  # pixels; a few more than shown, so that phones with dense screens look sharp
THUMBNAIL_QUALITY = 80
MISTAKES_SHOWN = 24
HITS_SHOWN = 12
CHART = {"width": 360, "height": 210, "left": 58, "right": 350, "top": 10, "bottom": 184}

SPLITS = ("train", "val", "test")
FOOD101_TERMS = (
    "Food-101's photos come from Foodspotting and do not belong to ETH Zurich: any use beyond "
    "scientific fair use must be negotiated with the owners of the pictures (the data set's own "
    "licence agreement, https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/)."
)


def write_confusion_matrix(results: dict[str, Any], path: Path) -> None:
    """Draw the matrix as PNG: right answers blue, mistakes orange, counts in the cells."""
    from matplotlib.figure import Figure  # takes a second, which only a release should pay

    counts, classes = np.array(results["confusion_matrix"]), results["classes"]
    labels = [_shortened(name, 32) for name in classes]
    cell = float(np.interp(len(classes), [10, 101], [0.6, 0.24]))  # inches; 0.24 holds 7.5 points
    points = float(np.interp(len(classes), [10, 101], [11, 7.5]))
    matrix, names = cell * len(classes), 0.01 * points * max(map(len, labels)) + 0.6
    side = max(matrix + names + 0.8, 4.5)
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((names / side, names / side, matrix / side, matrix / side))
    diagonal = np.eye(len(classes), dtype=bool)
    # mistakes are small shares: their scale ends at 0.3 so that a 10 % confusion is seen
    _draw_cells(axes, counts, diagonal, "Blues", 1.0, points)
    _draw_cells(axes, counts, ~diagonal, "Oranges", 0.3, points)
    axes.set_xticks(np.arange(len(classes)) + 0.5, labels, rotation=90)
    axes.set_yticks(np.arange(len(classes)) + 0.5, labels)
    for name in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        name.set_parse_math(False)  # a dish may be called "$5 menu to $10"
    axes.grid(visible=False)
    axes.patch.set(facecolor="white")
    for spine in axes.spines.values():
        spine.set(visible=True, color="#bbbbbb")
    axes.tick_params(labelsize=points, length=0)
    axes.set_xlabel("predicted", fontsize=points + 3)
    axes.set_ylabel("actual", fontsize=points + 3)
    title = f"{results['num_images']:,} test images, top-1 {_percent(results['top1'])}"
    axes.set_title(title, fontsize=points + 5, loc="left", pad=12)
    figure.savefig(path, dpi=130, format="png")


def _draw_cells(
    axes: "Axes", counts: np.ndarray, shown: np.ndarray, colours: str, top: float, points: float
) -> None:
    """Colour the shown cells by their share of the row, `top` the darkest, with their counts."""
    import seaborn

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    seaborn.heatmap(
        shares,
        mask=~shown | (counts == 0),
        cmap=colours,
        vmin=0,
        vmax=top,
        cbar=False,
        linewidths=0.4,
        linecolor="#dddddd",
        # seaborn's own labels and annotations take half a minute for 101 classes
        xticklabels=False,
        yticklabels=False,
        ax=axes,
    )
    for row, column in zip(*(counts * shown).nonzero(), strict=True):
        axes.annotate(
            str(counts[row, column]),
            (column + 0.5, row + 0.5),
            color="white" if shares[row, column] > 0.6 * top else "black",
            size=points,
            ha="center",
            va="center_baseline",
        )


def write_report(
    path: Path,
    *,
    results: dict[str, Any],
    rows: list[dict[str, Any]],
    history: list[dict[str, Any]],
    facts: dict[str, Any],
) -> None:
    """Write the whole run as one self-contained page that needs no network.

    `results` and `rows` come from `release.metrics`, `history` holds one record per epoch and
    `facts` says what was trained on what, with which settings. An image that cannot be read any
    more is shown as missing, by name.
    """
    mistakes = sorted((r for r in rows if not r["correct"]), key=lambda r: -r["confidence"])
    hits = sorted((r for r in rows if r["correct"]), key=lambda r: r["confidence"])
    page = (
        _environment()
        .get_template("report.html")
        .render(
            results=results,
            facts=facts,
            history=history,
            charts=_charts(history),
            chart_box=CHART,
            marks={"best": facts["best_epoch"], "stopped": facts["stopped_epoch"]},
            classes_by_f1=sorted(results["per_class"], key=_f1_or_last),
            typical_class=_typical_class(results),
            mistakes=[_with_thumbnail(row) for row in mistakes[:MISTAKES_SHOWN]],
            num_mistakes=len(mistakes),
            hits=[_with_thumbnail(row) for row in hits[:HITS_SHOWN]],
            audit=_audit_summary(facts["audit"]),
            only_drawn=_only_drawn(facts),
        )
    )
    # backslashreplace: a file name may hold bytes that are no text
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def write_comparison(path: Path, comparison: dict[str, Any]) -> list[str]:
    """Write what `commands.compare` found as one page; the pictures that are gone, by path."""
    shown = {
        kind: [_with_thumbnail(row) for row in rows[:MISTAKES_SHOWN]]
        for kind, rows in comparison["flips"].items()
    }
    template = _environment().get_template("comparison.html")
    page = template.render(comparison=comparison, shown=shown)
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return [row["file"] for rows in shown.values() for row in rows if not row["thumbnail"]]


def write_model_card(path: Path, *, results: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write MODEL_CARD.md from the recorded facts; what was not recorded is not claimed."""
    title = f"# {_markdown(facts['model_name'])}, version {_markdown(facts['version'])}"
    sections = {
        "Model": _card_model(facts),
        "Data": _card_data(facts["audit"], facts["classes"]),
        "Licence notes": _card_licences(facts),
        "Metrics": [*_card_metrics(results), *_card_verdicts(facts["verdicts"]["test"])],
        "Intended use": [
            "Naming the dish in one photo, when the photo shows one of the classes listed above.",
            "Not for decisions about allergies or health: a wrong answer can look certain.",
        ],
        "Limits": _card_limits(results, facts),
        "How to repeat it": [f"    {facts['command']}"],
    }
    body = [title, *(f"## {name}\n\n" + "\n".join(lines) for name, lines in sections.items())]
    path.write_text("\n\n".join(body) + "\n", encoding="utf-8", errors="backslashreplace")


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "points": _points,
        "seconds": _seconds,
        "breakable": _breakable,
    }
    return environment


def _charts(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not history:
        return []
    pairs = {"train": "train", "val": "validation"}
    return [
        _chart("Loss", history, {f"{k}_loss": name for k, name in pairs.items()}, "{:.3g}"),
        _chart("Accuracy", history, {f"{k}_acc": name for k, name in pairs.items()}, "{:.1%}"),
        _chart("Learning rate", history, {"learning_rate": "learning rate"}, "{:.3g}"),
    ]


def _chart(
    title: str, history: list[dict[str, Any]], series: dict[str, str], number: str
) -> dict[str, Any]:
    """Place one chart's lines and ticks in the coordinates of CHART."""
    from matplotlib.ticker import MaxNLocator

    values = [record[key] for key in series for record in history]
    # accuracy curves use the room they need; a loss or a rate is read against zero
    lowest = min(values) if title == "Accuracy" else 0.0
    ticks = MaxNLocator(4).tick_values(lowest, max(values))
    epochs = [record["epoch"] for record in history]
    span = max(epochs[-1] - epochs[0], 1)

    def place_x(epoch: float) -> float:
        return round(
            CHART["left"] + (CHART["right"] - CHART["left"]) * (epoch - epochs[0]) / span, 1
        )

    def place_y(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return round(float(CHART["bottom"] - (CHART["bottom"] - CHART["top"]) * share), 1)

    epoch_ticks = MaxNLocator(6, integer=True).tick_values(epochs[0], epochs[-1])
    return {
        "title": title,
        "x_ticks": [(place_x(e), int(e)) for e in epoch_ticks if epochs[0] <= e <= epochs[-1]],
        "y_ticks": [(place_y(t), number.replace(".1%", ".0%").format(t)) for t in ticks],
        "x": {epoch: place_x(epoch) for epoch in epochs},
        "series": [
            {
                "name": name,
                "style": "faint" if key.startswith("train") else "strong",
                "y": {record["epoch"]: place_y(record[key]) for record in history},
                "text": {record["epoch"]: number.format(record[key]) for record in history},
            }
            for key, name in series.items()
        ],
    }


def _f1_or_last(scores: dict[str, Any]) -> float:
    return 2.0 if scores["f1"] is None else scores["f1"]


def _typical_class(results: dict[str, Any]) -> dict[str, Any]:
    """Give the middling class size and the 95 % margin of a recall near one half at that size."""
    supports = [scores["support"] for scores in results["per_class"] if scores["support"]]
    support = int(statistics.median_low(supports))
    low, high = wilson_interval(support // 2, support)
    return {"support": support, "recall_margin": (high - low) / 2}


def _with_thumbnail(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "file_name": Path(row["file"]).name, "thumbnail": _thumbnail(row["file"])}


def _thumbnail(file: str) -> str | None:
    """Give the image's square centre, about what the network sees, as a data URI."""
    try:
        image = ImageOps.fit(load_image(file), (THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    except (ImageError, OSError):  # moved or deleted since the test: the page says so
        return None
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _audit_summary(audit: dict[str, Any]) -> dict[str, Any]:
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


def _percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def _points(change: float) -> str:
    """A difference of two shares, in points, with a sign that is as wide as a digit."""
    sign = "+" if change > 0 else "\N{MINUS SIGN}" if change < 0 else "\N{PLUS-MINUS SIGN}"
    return f"{sign}{abs(100 * change):.1f}"


def _seconds(value: Any) -> str:
    if not isinstance(value, int | float):
        return str(value)
    if value < 60:
        return f"{value:.1f} s"
    hours, minutes = divmod(round(value) // 60, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {round(value) % 60:02} s"


def _breakable(name: str) -> Markup:
    """Escape a name and let the browser break it after underscores."""
    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _card_model(facts: dict[str, Any]) -> list[str]:
    config = facts["config"]
    stopped = facts["stopped_epoch"]
    lines = [
        f"- Network: {_markdown(facts['model_name'])}, one output for each of "
        f"{len(facts['classes'])} classes",
        f"- Started from weights: {_markdown(config['weights'])}",
        f"- Best epoch: {facts['best_epoch']} of {config['epochs']} asked for"
        + (f", stopped after epoch {stopped}" if stopped else ""),
        f"- Made: {_markdown(facts['created'])}",
    ]
    return lines + [f"- {_markdown(n)} {_markdown(v)}" for n, v in facts["versions"].items()]


def _card_data(audit: dict[str, Any], classes: Sequence[str]) -> list[str]:
    summary = _audit_summary(audit)
    totals = summary["totals"]
    lines = [
        f"- Source: {_markdown(audit['source'])}",
        "- Images: " + ", ".join(f"{totals[split]:,} {split}" for split in SPLITS),
        f"- Left out because they could not be used: {len(audit['skipped']):,}",
        f"- Pictures found in more than one split: {len(audit['duplicates']):,}",
    ]
    lines += [
        f"- Added by the user: {_markdown(c['class'])}, {c['images']:,} images"
        for c in summary["custom"]
    ]
    return [*lines, "", "Classes: " + ", ".join(map(_markdown, classes)) + "."]


def _only_drawn(facts: dict[str, Any]) -> bool:
    return bool(facts["config"].get("sample")) and not facts["audit"].get("custom")


def _card_licences(facts: dict[str, Any]) -> list[str]:
    if _only_drawn(facts):
        return ["The training pictures were drawn by this project; no photo was used."]
    lines = ["The training run records where the photos came from, not what their owners allow."]
    if "food-101" in facts["audit"]["source"].lower():
        lines.append(FOOD101_TERMS)
    return [*lines, "Settle the rights to the photos and to the starting weights before sharing."]


def _card_metrics(results: dict[str, Any]) -> list[str]:
    calibration = results["calibration"]
    scores = [
        ("top-1 accuracy", *map(_percent, (results["top1"], *results["top1_ci95"]))),
        ("top-5 accuracy", *map(_percent, (results["top5"], *results["top5_ci95"]))),
    ]
    return [
        f"Measured once on {results['num_images']:,} test images, with the weights of the best "
        "epoch.",
        "",
        "| metric | value | remark |",
        "|---|---|---|",
        *(
            f"| {name} | {value} | 95 % interval {low} to {high} |"
            for name, value, low, high in scores
        ),
        f"| macro F1 | {results['macro']['f1']:.3f} | |",
        f"| test loss (mean NLL) | {results['loss']:.3f} | |",
        f"| calibration error (ECE) at temperature {calibration['temperature']:.2f} "
        f"| {calibration['ece_after']:.3f} | a perfectly calibrated model shows about "
        f"{calibration['ece_by_chance']:.3f} by chance |",
        f"| Brier score (0 to 2) | {calibration['brier_after']:.3f} | |",
    ]


def _card_verdicts(verdicts: dict[str, Any]) -> list[str]:
    sure = verdicts["confident"]
    right = "" if sure["accuracy"] is None else f", {_percent(sure['accuracy'])} of them right"
    return [
        f"| answers called confident | {_percent(sure['share'])}{right} | |",
        f"| test pictures called not food | {_percent(verdicts['not_food']['share'])} | |",
    ]


def _card_limits(results: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    lines = [
        f"- It knows {results['num_classes']} classes. A dish outside them has no right answer.",
        "- Hardest classes: "
        + ", ".join(
            f"{_markdown(c['class_name'])} (F1 {c['f1']:.2f})" for c in results["worst_classes"]
        )
        + ".",
    ]
    if pairs := results["most_confused"][:5]:
        confused = ", ".join(
            f"{_markdown(p['actual'])} taken for {_markdown(p['predicted'])} ({p['count']})"
            for p in pairs
        )
        lines.append(f"- Most frequent mistakes: {confused}.")
    if untested := [c["class_name"] for c in results["per_class"] if not c["support"]]:
        lines.append(f"- Never tested, for want of images: {', '.join(map(_markdown, untested))}.")
    if _only_drawn(facts):
        lines.append("- It has only seen drawn plates: its figures say nothing about photos.")
    return lines


def _markdown(value: Any) -> str:
    """Keep a name from becoming markup: HTML escaped, Markdown's own marks behind a backslash."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", text)
