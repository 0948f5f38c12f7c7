"""The numbers of a finished run: scores, intervals, confusions and every single prediction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, TypeVar

import numpy as np

from training.release.calibration import (
    Calibration,
    checked,
    in_blocks,
    measure_calibration,
    probabilities,
    softmax,
)

BEST_AND_WORST = 5
MOST_CONFUSED = 25
TOP_COLUMNS = 3
PREDICTIONS_NAME = "test_predictions.csv"
CLEAR = 0.05  # a p-value below is called a clear difference


class Averages(TypedDict):
    """Precision, recall and F1, averaged over classes."""

    precision: float
    recall: float
    f1: float


class ClassScores(TypedDict):
    """One class's scores; None where it has no test images. support: how many it has."""

    class_name: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int


class ConfusedPair(TypedDict):
    """Images of one class answered as another. share: of the actual class's images."""

    actual: str
    predicted: str
    count: int
    share: float


class Results(TypedDict):
    """What the test found; ready for JSON.

    balanced_accuracy: mean recall of the classes, whatever their sizes. loss: mean NLL of the
    logits as they are, so that it compares with the training curves. confusion_matrix: row actual,
    column predicted. A class without test images has no part in the averages.
    """

    num_images: int
    num_classes: int
    top1: float
    top1_ci95: list[float]
    top5: float
    top5_ci95: list[float]
    balanced_accuracy: float
    loss: float
    macro: Averages
    weighted: Averages
    per_class: list[ClassScores]
    best_classes: list[ClassScores]
    worst_classes: list[ClassScores]
    most_confused: list[ConfusedPair]
    calibration: Calibration
    classes: list[str]
    confusion_matrix: list[list[int]]


class PredictionRow(TypedDict):
    """One test image: what it is, what was answered; actual_rank 1 is a right answer.

    Places beyond the number of classes are None.
    """

    file: str
    actual: str
    predicted: str
    correct: bool
    confidence: float
    actual_probability: float
    actual_rank: int
    top1_class: str | None
    top1_probability: float | None
    top2_class: str | None
    top2_probability: float | None
    top3_class: str | None
    top3_probability: float | None


PREDICTION_COLUMNS = list(PredictionRow.__annotations__)


def evaluate(
    logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], *, temperature: float = 1.0
) -> Results:
    """Score logits (N, C) against labels (N,).

    Raises:
        ValueError: they are empty, misshapen, not finite, or of other classes.
    """
    from sklearn.metrics import confusion_matrix  # takes seconds, which only a release should pay

    logits, labels = checked(logits, labels)
    _check_classes(classes, logits)
    predicted, ranks = logits.argmax(axis=1), _ranks(logits, labels)
    matrix = confusion_matrix(labels, predicted, labels=range(len(classes)))  # (C, C)
    per_class, macro, weighted = _class_scores(labels, predicted, classes)
    best, worst = _best_and_worst(per_class)
    return {
        "num_images": len(labels),
        "num_classes": len(classes),
        "top1": float((ranks == 1).mean()),
        "top1_ci95": list(wilson_interval(int((ranks == 1).sum()), len(labels))),
        "top5": float((ranks <= 5).mean()),
        "top5_ci95": list(wilson_interval(int((ranks <= 5).sum()), len(labels))),
        "balanced_accuracy": macro["recall"],
        "loss": _mean_nll(logits, labels),
        "macro": macro,
        "weighted": weighted,
        "per_class": per_class,
        "best_classes": best,
        "worst_classes": worst,
        "most_confused": _most_confused(matrix, classes),
        "calibration": measure_calibration(logits, labels, temperature),
        "classes": list(classes),
        "confusion_matrix": matrix.tolist(),
    }


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """Compute the 95% interval of a proportion (Wilson 1927), sound for few images too."""
    from scipy.stats import binomtest

    low, high = binomtest(hits, total).proportion_ci(method="wilson")
    share = hits / total  # lies inside; rounding must not put it 1e-17 outside
    return min(share, float(low)), max(share, float(high))


Paired = TypeVar("Paired", bound="PairedTest")


@dataclass(frozen=True)
class PairedTest:
    """The same images answered by two models.

    gained, lost: how many only the second, only the first answers correctly.
    """

    gained: int
    lost: int
    total: int

    @classmethod
    def of(cls: type[Paired], first: np.ndarray, second: np.ndarray) -> Paired:
        """Count from whether each model is right, bool (N,), in the same order."""
        gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
        return cls(gained, lost, len(first))

    @property
    def change(self) -> float:
        """The second model's accuracy less the first's."""
        return (self.gained - self.lost) / self.total

    @property
    def p_value(self) -> float:
        return mcnemar_p(self.gained, self.lost)

    @property
    def is_clear(self) -> bool:
        return self.p_value < CLEAR

    @property
    def is_worse(self) -> bool:
        """Whether the second model loses more than chance explains."""
        return self.gained < self.lost and self.is_clear


def mcnemar_p(gained: int, lost: int) -> float:
    """Compute the chance of a split at least as lopsided if each flip were a fair coin toss.

    McNemar's test (1947, Psychometrika 12:153) in its exact, two-sided, binomial form; Dietterich
    (1998, Neural Computation 10:1895) advises it for two classifiers and one test set.
    """
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _check_classes(classes: Sequence[str], logits: np.ndarray) -> None:
    if len(classes) != logits.shape[1]:
        raise ValueError(
            f"got {len(classes)} class names for logits with {logits.shape[1]} columns; "
            "use the class map the model was trained with"
        )


def _ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rank each image's actual class, from 1; a tie goes to the lower index, as in argmax."""
    ranks = np.empty(len(labels), dtype=int)
    columns = np.arange(logits.shape[1])
    for where, block in in_blocks(logits):
        label = labels[where, None]
        actual = np.take_along_axis(block, label, axis=1)
        is_ahead = (block > actual) | ((block == actual) & (columns < label))
        ranks[where] = 1 + is_ahead.sum(axis=1)
    return ranks


def _mean_nll(logits: np.ndarray, labels: np.ndarray) -> float:
    from scipy.special import log_softmax

    total = 0.0
    for where, block in in_blocks(logits):
        total -= log_softmax(block, axis=1)[np.arange(len(block)), labels[where]].sum()
    return float(total / len(labels))


def _class_scores(
    labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]
) -> tuple[list[ClassScores], Averages, Averages]:
    """Score each class; return the scores, their mean, and their mean weighted by support."""
    from sklearn.metrics import precision_recall_fscore_support

    # a class that has images but is never predicted scores 0, scikit-learn's own convention
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=range(len(classes)), zero_division=0.0
    )
    per_class: list[ClassScores] = [
        {
            "class_name": class_name,
            "precision": float(precision[i]) if support[i] else None,
            "recall": float(recall[i]) if support[i] else None,
            "f1": float(f1[i]) if support[i] else None,
            "support": int(support[i]),
        }
        for i, class_name in enumerate(classes)
    ]

    def averages(weights: np.ndarray) -> Averages:
        means = [float(np.average(scores, weights=weights)) for scores in (precision, recall, f1)]
        return {"precision": means[0], "recall": means[1], "f1": means[2]}

    return per_class, averages(support > 0), averages(support)


def _best_and_worst(scores: list[ClassScores]) -> tuple[list[ClassScores], list[ClassScores]]:
    """Pick the classes with the highest F1 and those with the lowest, the extremes first."""
    tested = [(c["f1"], c) for c in scores if c["f1"] is not None]
    by_f1 = [c for _, c in sorted(tested, key=lambda pair: (-pair[0], pair[1]["class_name"]))]
    shown = min(BEST_AND_WORST, math.ceil(len(by_f1) / 2))
    return by_f1[:shown], by_f1[::-1][:shown]


def _most_confused(matrix: np.ndarray, classes: Sequence[str]) -> list[ConfusedPair]:
    mistakes = matrix - np.diag(np.diag(matrix))
    supports = matrix.sum(axis=1)
    pairs = [(int(mistakes[i, j]), int(i), int(j)) for i, j in np.argwhere(mistakes)]
    pairs.sort(key=lambda pair: (-pair[0], -pair[0] / supports[pair[1]], pair[1:]))
    return [
        {
            "actual": classes[i],
            "predicted": classes[j],
            "count": count,
            "share": float(count / supports[i]),
        }
        for count, i, j in pairs[:MOST_CONFUSED]
    ]


# Every single prediction ----------------------------------------------------------------------


def prediction_rows(
    paths: Sequence[str | Path],
    labels: np.ndarray,
    logits: np.ndarray,
    classes: Sequence[str],
    temperature: float = 1.0,
) -> list[PredictionRow]:
    """Put every prediction beside its actual class, probabilities at `temperature`, in input order.

    Raises:
        ValueError: as for `evaluate`, or not one path per image.
    """
    logits, labels = checked(logits, labels)
    _check_classes(classes, logits)
    if len(paths) != len(labels):
        raise ValueError(
            f"got {len(paths)} file paths for {len(labels)} labels; give one per image"
        )
    ranks, actual = _ranks(logits, labels), probabilities(logits, labels, temperature).actual
    top, shares = _top_answers(logits, temperature)
    return [
        _prediction_row(
            str(path),
            classes[labels[i]],
            [classes[index] for index in top[i]],
            shares[i].tolist(),
            float(actual[i]),
            int(ranks[i]),
        )
        for i, path in enumerate(paths)
    ]


def _top_answers(logits: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Find the first answers and their probabilities, each (N, at most TOP_COLUMNS)."""
    top, shares = [], []
    for _, block in in_blocks(logits):
        # stable: a tie goes to the lower index, as it does in argmax
        top.append(np.argsort(-block, axis=1, kind="stable")[:, :TOP_COLUMNS])
        shares.append(np.take_along_axis(softmax(block, temperature), top[-1], axis=1))
    return np.concatenate(top), np.concatenate(shares)


def _prediction_row(
    file: str,
    actual: str,
    answers: list[str],
    answer_probabilities: list[float],
    actual_probability: float,
    rank: int,
) -> PredictionRow:
    missing = [None] * (TOP_COLUMNS - len(answers))
    names, shares = [*answers, *missing], [*answer_probabilities, *missing]
    return {
        "file": file,
        "actual": actual,
        "predicted": answers[0],
        "correct": rank == 1,
        "confidence": answer_probabilities[0],
        "actual_probability": actual_probability,
        "actual_rank": rank,
        "top1_class": names[0],
        "top1_probability": shares[0],
        "top2_class": names[1],
        "top2_probability": shares[1],
        "top3_class": names[2],
        "top3_probability": shares[2],
    }
