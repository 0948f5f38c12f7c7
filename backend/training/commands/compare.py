"""Two released versions on the test images of both: numbers, a paired test, and a page to look at.

What is compared, `training.release.promotion` says.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from app.ml.artifacts import ModelRecord
from training.release.calibration import Bin, calibration_error, reliability_bins
from training.release.metrics import CLEAR, PairedTest, mcnemar_p, wilson_interval
from training.release.promotion import (
    Answer,
    ComparisonError,
    VersionTest,
    images_of_both,
    read_test,
)
from training.release.report import PICTURES_SHOWN, with_thumbnail, write_page

Z_95 = 1.959964  # two-sided 95% quantile of the normal distribution
PRINTED_CLASSES = 10
PRINTED_NAMES = 5

logger = logging.getLogger(__name__)


class VersionScores(TypedDict):
    """One version's scores on the images of both."""

    name: str
    model_name: str
    created: str
    num_classes: int
    top1: float
    top1_ci95: tuple[float, float]
    top5: float
    ece: float
    bins: list[Bin]


class ClassChange(TypedDict):
    """One class: old and new are its recall; is_clear: after correction for all the classes."""

    class_name: str
    images: int
    old: float
    new: float
    gained: int
    lost: int
    change: float
    is_clear: bool


class Flip(TypedDict):
    """An image that one version alone got right."""

    file: str
    actual: str
    old: Answer
    new: Answer
    wrong_confidence: float


class Comparison(TypedDict):
    """What the page and the printed table say; "gained" is what the new version alone gets right.

    difference: of the top-1 accuracies. flips: "lost" and "gained". settings: name, old, new.
    """

    versions: tuple[VersionScores, VersionScores]
    num_images: int
    both_right: int
    both_wrong: int
    gained: int
    lost: int
    difference: float
    difference_ci95: tuple[float, float]
    p_text: str
    is_clear: bool
    conclusion: str
    per_class: list[ClassChange]
    flips: dict[str, list[Flip]]
    settings: list[tuple[str, object, object]]
    notes: list[str]


def compare_versions(model_dir: Path, old_version: int, new_version: int) -> Path:
    """Print how the new version differs from the old one and draw it; return the page.

    Raises:
        ArtifactError: a version or its test is missing, or no image was in both tests.
    """
    if old_version == new_version:
        raise ComparisonError(f"--compare v{old_version} v{new_version}: these are the same")
    old, new = (read_test(model_dir, version) for version in (old_version, new_version))
    comparison = compare(old, new)
    for line in summary_lines(comparison):
        print(line)  # noqa: T201
    page = model_dir / f"comparison_v{old_version}_v{new_version}.html"
    if missing := write_comparison(page, comparison):
        logger.warning("pictures no longer available: %d (%s)", len(missing), _some_of(missing))
    return page


def compare(old: VersionTest, new: VersionTest) -> Comparison:
    """Compute everything the page and the printed table say.

    Raises:
        ComparisonError: no image was in both tests under the same class.
    """
    shared = [path for path in new.answers if path in old.answers]
    paths = images_of_both(old, new)
    if not paths:
        raise ComparisonError(
            f"{old.name} and {new.name} have no test image in common ({old.name}: "
            f"{_first(old)}, {new.name}: {_first(new)}); train both on the same data"
        )
    hits = np.array([[t.answers[p].correct for p in paths] for t in (old, new)])  # (2, N)
    is_gained, is_lost = ~hits[0] & hits[1], hits[0] & ~hits[1]
    test = PairedTest.of(*hits)
    return {
        "versions": (_scores(old, paths), _scores(new, paths)),
        "num_images": test.total,
        "both_right": int((hits[0] & hits[1]).sum()),
        "both_wrong": int((~hits[0] & ~hits[1]).sum()),
        "gained": test.gained,
        "lost": test.lost,
        "difference": test.change,
        "difference_ci95": paired_interval(test.gained, test.lost, test.total),
        "p_text": _p_text(test.p_value),
        "is_clear": test.is_clear,
        "conclusion": _conclusion(old.name, new.name, test.gained - test.lost, test.p_value),
        "per_class": _class_changes(old, new, paths),
        "flips": {
            "lost": _flips(old, new, paths, is_lost),
            "gained": _flips(old, new, paths, is_gained),
        },
        "settings": _other_settings(old.record, new.record),
        "notes": _notes(old, new, shared, paths),
    }


def paired_interval(gained: int, lost: int, total: int) -> tuple[float, float]:
    """Compute the 95% interval of the difference of two shares of the same images.

    Wald's interval with half an image more in each of the four cells (Agresti and Min 2005,
    Statistics in Medicine 24:729), which keeps its 95% for few images too.
    """
    gained_up, lost_up, total_up = gained + 0.5, lost + 0.5, total + 2
    center = (gained_up - lost_up) / total_up
    variance = (gained_up + lost_up) / total_up - center**2
    half = Z_95 * math.sqrt(variance / total_up)
    return max(-1.0, center - half), min(1.0, center + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for how many there are (Holm 1979, Scand. J. Statistics 6:65)."""
    corrected, highest = list(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def _first(tested: VersionTest) -> str:
    return next(iter(tested.answers), "none at all")


def _scores(tested: VersionTest, paths: Sequence[str]) -> VersionScores:
    answers = [tested.answers[path] for path in paths]
    ranks = np.array([answer.actual_rank for answer in answers])
    confidences = np.array([answer.confidence for answer in answers])
    bins = reliability_bins(confidences, ranks == 1)
    top1, top5 = int((ranks == 1).sum()), int((ranks <= 5).sum())
    return {
        "name": tested.name,
        "model_name": tested.record.model_name,
        "created": tested.record.created,
        "num_classes": len(tested.record.classes),
        "top1": top1 / len(paths),
        "top1_ci95": wilson_interval(top1, len(paths)),
        "top5": top5 / len(paths),
        "ece": calibration_error(bins),
        "bins": bins,
    }


def _p_text(p_value: float) -> str:
    if p_value < 0.001:
        return "p < 0.001"
    digits = 5 if abs(p_value - CLEAR) < 0.0005 else 3  # "0.050" would be on both sides of CLEAR
    return f"p = {p_value:.{digits}f}"


def _conclusion(old: str, new: str, gain: int, p_value: float) -> str:
    if p_value >= CLEAR:
        return f"No clear difference: it may be chance ({_p_text(p_value)})."
    return f"{new} is {'better' if gain > 0 else 'worse'} than {old} ({_p_text(p_value)})."


def _class_changes(old: VersionTest, new: VersionTest, paths: Sequence[str]) -> list[ClassChange]:
    """Describe the change of each class, the largest first."""
    pairs: dict[str, list[tuple[bool, bool]]] = {}
    for path in paths:
        before, after = old.answers[path], new.answers[path]
        pairs.setdefault(after.actual, []).append((before.correct, after.correct))
    names = list(pairs)
    gained = [pairs[name].count((False, True)) for name in names]
    lost = [pairs[name].count((True, False)) for name in names]
    p_values = holm([mcnemar_p(*counts) for counts in zip(gained, lost, strict=True)])
    changes: list[ClassChange] = [
        {
            "class_name": name,
            "images": len(pairs[name]),
            "old": sum(before for before, _ in pairs[name]) / len(pairs[name]),
            "new": sum(after for _, after in pairs[name]) / len(pairs[name]),
            "gained": gained[i],
            "lost": lost[i],
            "change": (gained[i] - lost[i]) / len(pairs[name]),
            "is_clear": p_values[i] < CLEAR,
        }
        for i, name in enumerate(names)
    ]
    return sorted(changes, key=lambda c: (-abs(c["change"]), -c["images"], c["class_name"]))


def _flips(
    old: VersionTest, new: VersionTest, paths: Sequence[str], flipped: np.ndarray
) -> list[Flip]:
    """List the flipped images with both answers, the most confident wrong answer first."""
    rows = []
    for path in (paths[i] for i in np.flatnonzero(flipped).tolist()):
        before, after = old.answers[path], new.answers[path]
        wrong = after if before.correct else before
        rows.append(
            Flip(
                file=path,
                actual=after.actual,
                old=before,
                new=after,
                wrong_confidence=wrong.confidence,
            )
        )
    return sorted(rows, key=lambda row: -row["wrong_confidence"])


def _other_settings(old: ModelRecord, new: ModelRecord) -> list[tuple[str, object, object]]:
    """List the settings that differ: name, then, now."""
    before, after = old.training, new.training
    names = dict.fromkeys([*before, *after])
    return [(n, before.get(n), after.get(n)) for n in names if before.get(n) != after.get(n)]


def _notes(old: VersionTest, new: VersionTest, shared: list[str], paths: list[str]) -> list[str]:
    """Say what the comparison skips, and what makes it less than fair."""
    notes = []
    for tested in (old, new):
        if only := len(tested.answers) - len(shared):
            notes.append(f"{only:,} images that only {tested.name} was tested on are not compared.")
    if moved := len(shared) - len(paths):
        notes.append(f"{moved:,} images whose class changed in between are not compared.")
    for tested, other in ((old, new), (new, old)):
        if more := sorted(set(tested.record.classes) - set(other.record.classes)):
            notes.append(
                f"{tested.name} alone knows {len(more):,} classes ({_some_of(more)}): it had more "
                "to choose from."
            )
    return notes


def _some_of(names: Sequence[str]) -> str:
    return ", ".join(names[:PRINTED_NAMES]) + (" …" if len(names) > PRINTED_NAMES else "")


def write_comparison(path: Path, comparison: Comparison) -> list[str]:
    """Draw the comparison as one page; return the pictures that are no longer available."""
    shown = {
        kind: [with_thumbnail(flip) for flip in flips[:PICTURES_SHOWN]]
        for kind, flips in comparison["flips"].items()
    }
    write_page(path, "comparison.html", comparison=comparison, shown=shown)
    return [flip["file"] for flips in shown.values() for flip in flips if not flip["photo"]]


def summary_lines(comparison: Comparison) -> list[str]:
    """Format the comparison as it is printed."""
    old, new = comparison["versions"]
    low, high = comparison["difference_ci95"]
    rows = [["", old["name"], new["name"], f"{new['name']} - {old['name']}"]]
    tops = [
        f"{v['top1']:.4f} ({v['top1_ci95'][0]:.3f} to {v['top1_ci95'][1]:.3f})" for v in (old, new)
    ]
    rows.append(["top-1", *tops, f"{comparison['difference']:+.4f} ({low:+.3f} to {high:+.3f})"])
    for label, before, after in (
        ("top-5", old["top5"], new["top5"]),
        ("ECE", old["ece"], new["ece"]),
    ):
        rows.append([label, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"])
    rows.append(["correct only here", str(comparison["lost"]), str(comparison["gained"]), ""])
    classes = comparison["per_class"]
    return [
        f"{old['name']} ({old['model_name']}) and {new['name']} ({new['model_name']}) on "
        f"{comparison['num_images']:,} images of {len(classes)} classes that both were tested on",
        *comparison["notes"],
        "",
        *_aligned(rows, "<"),
        "",
        f"McNemar's exact test: {comparison['conclusion']}",
        "",
        *_class_lines(classes, old["name"], new["name"]),
    ]


def _class_lines(classes: list[ClassChange], old: str, new: str) -> list[str]:
    rows = [["class", "images", old, new, "change", "gained", "lost", ""]]
    for c in classes[:PRINTED_CLASSES]:
        shares = [f"{c['old']:.2f}", f"{c['new']:.2f}", f"{c['change']:+.2f}"]
        flips = [str(c["gained"]), str(c["lost"]), "clear" if c["is_clear"] else ""]
        rows.append([c["class_name"], str(c["images"]), *shares, *flips])
    rest = len(classes) - PRINTED_CLASSES
    return _aligned(rows, ">") + ([f"and {rest} more classes on the page"] if rest > 0 else [])


def _aligned(rows: list[list[str]], side: str) -> list[str]:
    """Align the columns of rows: the first to the left, the others to this side."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<", *[side] * (len(widths) - 1)]
    return [
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]
