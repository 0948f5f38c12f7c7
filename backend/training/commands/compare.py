"""Two released versions on the test images of both: numbers, a paired test, and a page to look at.

Compared is what each version answered in its own test, as its report keeps it: on images that
neither was trained on, at once, and also where the images themselves are far away.
"""

import csv
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.ml.artifacts import ArtifactError, ModelRecord, read_record, report_folder_name
from training.release.metrics import (
    PREDICTIONS_NAME,
    Z_95,
    calibration_error,
    reliability_bins,
    wilson_interval,
)
from training.release.report import write_comparison

CLEAR = 0.05  # a p-value below is called a clear difference
PRINTED_CLASSES = 10
PRINTED_NAMES = 5

logger = logging.getLogger(__name__)


class ComparisonError(ArtifactError):
    """Two versions that cannot be compared; the message says why."""


@dataclass(frozen=True)
class Answer:
    """What a version answered for one test image; rank 1 means that it was right."""

    actual: str
    predicted: str
    confidence: float
    actual_rank: int

    @property
    def correct(self) -> bool:
        return self.actual_rank == 1


@dataclass(frozen=True)
class VersionTest:
    """A version and its answers by image path."""

    record: ModelRecord
    answers: dict[str, Answer]

    @property
    def name(self) -> str:
        return f"v{self.record.version}"


def compare_versions(model_dir: Path, old_version: int, new_version: int) -> Path:
    """Print how the new version differs from the old one and draw it; the page.

    Raises:
        ArtifactError: a version or its test is not there, or no image was in both tests.
    """
    if old_version == new_version:
        raise ComparisonError(f"--compare v{old_version} v{new_version}: these are the same")
    old, new = (read_test(model_dir, version) for version in (old_version, new_version))
    comparison = compare(old, new)
    for line in summary_lines(comparison):
        print(line)  # noqa: T201
    page = model_dir / f"comparison_v{old_version}_v{new_version}.html"
    if gone := write_comparison(page, comparison):
        logger.warning(
            "pictures that the page cannot show any more: %d (%s)", len(gone), _some_of(gone)
        )
    return page


def read_test(model_dir: Path, version: int) -> VersionTest:
    """A version's record and what it answered in its test.

    Raises:
        ArtifactError: not there or not readable.
    """
    record = read_record(model_dir, version)
    path = model_dir / report_folder_name(version) / PREDICTIONS_NAME
    try:
        with path.open(newline="", encoding="utf-8") as file:
            answers = {row["file"]: _answer(row) for row in csv.DictReader(file)}
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise ComparisonError(
            f"{path} cannot be used ({error!r}); it holds the test of version {version}, without "
            "which nothing can be compared"
        ) from error
    return VersionTest(record, answers)


def _answer(row: dict[str, str]) -> Answer:
    if None in row.values():
        raise ValueError("its last line is cut off")
    return Answer(
        row["actual"], row["predicted"], float(row["confidence"]), int(row["actual_rank"])
    )


def compare(old: VersionTest, new: VersionTest) -> dict[str, Any]:
    """Everything the page and the printed table say.

    Raises:
        ComparisonError: no image was in both tests under the same class.
    """
    shared = [path for path in new.answers if path in old.answers]
    paths = [p for p in shared if old.answers[p].actual == new.answers[p].actual]
    if not paths:
        raise ComparisonError(
            f"{old.name} and {new.name} have no test image in common ({old.name}: "
            f"{_first(old)}, {new.name}: {_first(new)}); train both on the same data"
        )
    hits = np.array([[t.answers[p].correct for p in paths] for t in (old, new)])  # (2, N)
    gained, lost = int((~hits[0] & hits[1]).sum()), int((hits[0] & ~hits[1]).sum())
    return {
        "versions": [_scores(tested, paths) for tested in (old, new)],
        "num_images": len(paths),
        "both_right": int((hits[0] & hits[1]).sum()),
        "both_wrong": int((~hits[0] & ~hits[1]).sum()),
        "gained": gained,
        "lost": lost,
        "difference": (gained - lost) / len(paths),
        "difference_ci95": list(paired_interval(gained, lost, len(paths))),
        "p_text": _p_text(p_value := mcnemar_p(gained, lost)),
        "is_clear": p_value < CLEAR,
        "conclusion": _conclusion(old.name, new.name, gained - lost, p_value),
        "per_class": _class_changes(old, new, paths),
        "flips": {
            "lost": _flips(old, new, paths, hits[0] & ~hits[1]),
            "gained": _flips(old, new, paths, ~hits[0] & hits[1]),
        },
        "settings": _other_settings(old.record, new.record),
        "notes": _notes(old, new, shared, paths),
    }


def mcnemar_p(gained: int, lost: int) -> float:
    """The chance of so lopsided a split, or a more lopsided one, if each flip were a fair coin.

    McNemar's test (1947, Psychometrika 12:153) in its exact, two-sided, binomial form; Dietterich
    (1998, Neural Computation 10:1895) advises it for two classifiers and one test set.
    """
    flips, fewer = gained + lost, min(gained, lost)
    ways = tail = 1  # to choose k of the flips; exact in whole numbers
    for k in range(1, fewer + 1):
        ways = ways * (flips - k + 1) // k
        tail += ways
    return min(1.0, 2 * tail / 2**flips)


def paired_interval(gained: int, lost: int, total: int) -> tuple[float, float]:
    """The 95 % interval of the difference of two shares of the same images.

    Wald's interval with half an image more in each of the four cells (Agresti and Min 2005,
    Statistics in Medicine 24:729), which keeps its 95 % for few images too.
    """
    gained_up, lost_up, total_up = gained + 0.5, lost + 0.5, total + 2
    centre = (gained_up - lost_up) / total_up
    variance = (gained_up + lost_up) / total_up - centre**2
    half = Z_95 * math.sqrt(variance / total_up)
    return max(-1.0, centre - half), min(1.0, centre + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, corrected for how many there are (Holm 1979, Scand. J. Statistics 6:65)."""
    corrected, highest = list(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def _first(tested: VersionTest) -> str:
    return next(iter(tested.answers), "none at all")


def _scores(tested: VersionTest, paths: Sequence[str]) -> dict[str, Any]:
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
        "top1_ci95": list(wilson_interval(top1, len(paths))),
        "top5": top5 / len(paths),
        "ece": calibration_error(bins),
        "bins": bins,
    }


def _p_text(p_value: float) -> str:
    if p_value < 0.001:
        return "p < 0.001"
    digits = 5 if abs(p_value - CLEAR) < 0.0005 else 3  # no "0.050" on both sides of the line
    return f"p = {p_value:.{digits}f}"


def _conclusion(old: str, new: str, gain: int, p_value: float) -> str:
    if p_value >= CLEAR:
        return f"No clear difference: chance alone may do as much ({_p_text(p_value)})."
    return f"{new} is {'better' if gain > 0 else 'worse'} than {old} ({_p_text(p_value)})."


def _class_changes(
    old: VersionTest, new: VersionTest, paths: Sequence[str]
) -> list[dict[str, Any]]:
    """One record per class, the largest change first."""
    members: dict[str, list[tuple[bool, bool]]] = {}
    for path in paths:
        pair = (old.answers[path].correct, new.answers[path].correct)
        members.setdefault(new.answers[path].actual, []).append(pair)
    changes: list[dict[str, Any]] = [
        {
            "class_name": name,
            "images": len(pairs),
            "old": sum(before for before, _ in pairs) / len(pairs),
            "new": sum(after for _, after in pairs) / len(pairs),
            "gained": (gained := pairs.count((False, True))),
            "lost": (lost := pairs.count((True, False))),
            "change": (gained - lost) / len(pairs),
        }
        for name, pairs in members.items()
    ]
    corrected = holm([mcnemar_p(change["gained"], change["lost"]) for change in changes])
    for change, p_value in zip(changes, corrected, strict=True):
        change["is_clear"] = p_value < CLEAR
    return sorted(changes, key=lambda c: (-abs(c["change"]), -c["images"], c["class_name"]))


def _flips(
    old: VersionTest, new: VersionTest, paths: Sequence[str], flipped: np.ndarray
) -> list[dict[str, Any]]:
    """The flipped pictures with both answers; those with the surest wrong answer first."""
    rows = []
    for path in (paths[i] for i in np.flatnonzero(flipped).tolist()):
        before, after = old.answers[path], new.answers[path]
        wrong = after if before.correct else before
        pair = {"old": before, "new": after, "actual": after.actual}
        rows.append({"file": path, "surest": wrong.confidence, **pair})
    return sorted(rows, key=lambda row: -row["surest"])


def _other_settings(old: ModelRecord, new: ModelRecord) -> list[tuple[str, Any, Any]]:
    """What both were trained with differently: name, then, now."""
    before, after = old.training, new.training
    names = dict.fromkeys([*before, *after])
    return [(n, before.get(n), after.get(n)) for n in names if before.get(n) != after.get(n)]


def _notes(old: VersionTest, new: VersionTest, shared: list[str], paths: list[str]) -> list[str]:
    """What was left out of the comparison, and what makes it less than fair."""
    notes = [
        f"{only:,} images that only {tested.name} was tested on are left out."
        for tested in (old, new)
        if (only := len(tested.answers) - len(shared))
    ]
    if moved := len(shared) - len(paths):
        notes.append(f"{moved:,} images that changed their class in between are left out.")
    for tested, other in ((old, new), (new, old)):
        if more := sorted(set(tested.record.classes) - set(other.record.classes)):
            notes.append(
                f"{tested.name} alone knows {len(more):,} classes ({_some_of(more)}): it had more "
                "to choose from."
            )
    return notes


def _some_of(names: Sequence[str]) -> str:
    return ", ".join(names[:PRINTED_NAMES]) + (" …" if len(names) > PRINTED_NAMES else "")


def summary_lines(comparison: dict[str, Any]) -> list[str]:
    """The comparison as it is printed."""
    old, new = comparison["versions"]
    low, high = comparison["difference_ci95"]
    rows = [["", old["name"], new["name"], f"{new['name']} - {old['name']}"]]
    tops = [
        f"{v['top1']:.4f} ({v['top1_ci95'][0]:.3f} to {v['top1_ci95'][1]:.3f})" for v in (old, new)
    ]
    rows.append(["top-1", *tops, f"{comparison['difference']:+.4f} ({low:+.3f} to {high:+.3f})"])
    for key, label in (("top5", "top-5"), ("ece", "ECE")):
        values = [f"{version[key]:.4f}" for version in (old, new)]
        rows.append([label, *values, f"{new[key] - old[key]:+.4f}"])
    rows.append(["right there only", str(comparison["lost"]), str(comparison["gained"]), ""])
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


def _class_lines(classes: list[dict[str, Any]], old: str, new: str) -> list[str]:
    rows = [["class", "images", old, new, "change", "gained", "lost", ""]]
    for c in classes[:PRINTED_CLASSES]:
        shares = [f"{c['old']:.2f}", f"{c['new']:.2f}", f"{c['change']:+.2f}"]
        flips = [str(c["gained"]), str(c["lost"]), "clear" if c["is_clear"] else ""]
        rows.append([c["class_name"], str(c["images"]), *shares, *flips])
    rest = len(classes) - PRINTED_CLASSES
    return [*_aligned(rows, ">"), *([f"and {rest} classes more on the page"] if rest > 0 else [])]


def _aligned(rows: list[list[str]], side: str) -> list[str]:
    """The rows as lines; the first column to the left, the others to this side."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<", *[side] * (len(widths) - 1)]
    return [
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]
