"""The numbers of a finished run: scores, confusions, calibration and every single prediction."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Z_95 = 1.959964  # two-sided 95 % quantile of the normal distribution
CALIBRATION_BINS = 15  # as in Guo et al. 2017
TEMPERATURE_LIMITS = (0.1, 10.0)
BEST_AND_WORST = 5
MOST_CONFUSED = 25
PREDICTIONS_NAME = "test_predictions.csv"
TOP_COLUMNS = 3
PREDICTION_COLUMNS = [
    *("file", "actual", "predicted", "correct", "confidence"),
    *("actual_probability", "actual_rank"),
    *(
        f"top{rank}_{part}"
        for rank in range(1, TOP_COLUMNS + 1)
        for part in ("class", "probability")
    ),
]


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Turn logits (N, C) into probabilities (N, C) in float64; T > 1 makes them less certain."""
    return np.exp(_log_softmax(logits, temperature))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Find the temperature that minimises the validation NLL (Guo et al. 2017, arXiv:1706.04599).

    The NLL is convex in b = 1/T, so its slope has one zero, found by bisection. A unit normal
    prior around b = 1 weighs about as much as one image: it keeps a perfectly separated or tiny
    set, whose NLL alone would ask for T = 0, at a sane value, and vanishes in a set of hundreds.
    Since it pulls towards T = 1, the NLL is never higher than with no temperature at all.
    """
    logits, labels = _checked(logits, labels)
    true_logits = logits[np.arange(len(labels)), labels]  # (N,)
    low, high = (1 / limit for limit in reversed(TEMPERATURE_LIMITS))
    for _ in range(50):  # halves the interval each time: far below float32 resolution
        middle = (low + high) / 2
        expected_logits = (softmax(logits, 1 / middle) * logits).sum(axis=1)  # (N,)
        slope = (expected_logits - true_logits).sum() + (middle - 1)
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(2 / (low + high))


def evaluate(
    logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], *, temperature: float = 1.0
) -> dict[str, Any]:
    """Score logits (N, C) against labels (N,); the answer is ready for JSON.

    `loss` is the mean NLL of the logits as they are, so that it compares with the training curves.
    A class without test images has no precision, recall or F1 (None) and no part in the averages.
    Raises ValueError for empty, misshapen or non-finite input.
    """
    from sklearn.metrics import confusion_matrix  # takes seconds, which only a release should pay

    logits, labels = _checked(logits, labels)
    _check_classes(classes, logits)
    ranked = _ranked(logits)
    top5_hits = int((ranked[:, :5] == labels[:, None]).any(axis=1).sum())
    top1_hits = int((ranked[:, 0] == labels).sum())
    matrix = confusion_matrix(labels, ranked[:, 0], labels=range(len(classes)))  # (C, C)
    return {
        "num_images": len(labels),
        "num_classes": len(classes),
        "top1": top1_hits / len(labels),
        "top1_ci95": list(wilson_interval(top1_hits, len(labels))),
        "top5": top5_hits / len(labels),
        "top5_ci95": list(wilson_interval(top5_hits, len(labels))),
        "loss": _nll(logits, labels),
        **_class_scores(labels, ranked[:, 0], classes),
        "most_confused": _most_confused(matrix, classes),
        "calibration": _calibration(logits, labels, temperature),
        "classes": list(classes),
        "confusion_matrix": matrix.tolist(),
    }


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """Give the 95 % interval of a proportion (Wilson 1927), sound for few images too."""
    share, z2 = hits / total, Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    # the share lies inside; rounding must not put it 1e-17 outside
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def prediction_rows(
    paths: Sequence[str | Path],
    labels: np.ndarray,
    logits: np.ndarray,
    classes: Sequence[str],
    temperature: float = 1.0,
) -> list[dict[str, Any]]:
    """Put every prediction beside its actual class, probabilities at `temperature`, in input order.

    The keys are PREDICTION_COLUMNS; places beyond the number of classes are None.
    """
    logits, labels = _checked(logits, labels)
    _check_classes(classes, logits)
    if len(paths) != len(labels):
        raise ValueError(
            f"Got {len(paths)} file paths for {len(labels)} labels; give one per image."
        )
    probabilities, ranked = softmax(logits, temperature), _ranked(logits)
    return [
        _prediction_row(str(path), int(label), probabilities[i], ranked[i], classes)
        for i, (path, label) in enumerate(zip(paths, labels, strict=True))
    ]


def write_predictions_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows of `prediction_rows` as UTF-8 CSV."""
    # backslashreplace: a file name may hold bytes that are no text
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, PREDICTION_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def _checked(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not logits.size:
        raise ValueError(
            f"Logits of shape {logits.shape} and labels of shape {labels.shape} do not fit; "
            "expected (N, C) and (N,) with at least one image."
        )
    bad_rows = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad_rows):
        raise ValueError(
            f"The logits of {len(bad_rows)} of {len(logits)} images are not finite, first at index "
            f"{bad_rows[0]}; the model has diverged, so train again with a lower learning rate."
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"Labels run from {labels.min()} to {labels.max()}, but the logits have "
            f"{logits.shape[1]} classes; use the class map the model was trained with."
        )
    return logits, labels


def _check_classes(classes: Sequence[str], logits: np.ndarray) -> None:
    if len(classes) != logits.shape[1]:
        raise ValueError(
            f"Got {len(classes)} class names for logits with {logits.shape[1]} columns; "
            "use the class map the model was trained with."
        )


def _log_softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))


def _ranked(logits: np.ndarray) -> np.ndarray:
    # stable, so that a tie goes to the lower index, as it does in argmax
    return np.argsort(-logits, axis=1, kind="stable")  # (N, C)


def _nll(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-_log_softmax(logits)[np.arange(len(labels)), labels].mean())


def _class_scores(
    labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]
) -> dict[str, Any]:
    from sklearn.metrics import precision_recall_fscore_support

    # a class that has images but is never predicted scores 0, scikit-learn's own convention
    *scores, support = precision_recall_fscore_support(
        labels, predicted, labels=range(len(classes)), zero_division=0.0
    )
    names, tested = ("precision", "recall", "f1"), support > 0
    per_class: list[dict[str, Any]] = [
        {
            "class_name": class_name,
            **{n: float(s[i]) if tested[i] else None for n, s in zip(names, scores, strict=True)},
            "support": int(support[i]),
        }
        for i, class_name in enumerate(classes)
    ]
    by_f1 = sorted(
        (c for c in per_class if c["support"]), key=lambda c: (-c["f1"], c["class_name"])
    )
    shown = min(BEST_AND_WORST, math.ceil(len(by_f1) / 2))
    return {
        "macro": {n: float(s[tested].mean()) for n, s in zip(names, scores, strict=True)},
        "weighted": {
            n: float(np.average(s, weights=support)) for n, s in zip(names, scores, strict=True)
        },
        "per_class": per_class,
        "best_classes": by_f1[:shown],
        "worst_classes": by_f1[::-1][:shown],
    }


def _most_confused(matrix: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    mistakes = matrix - np.diag(np.diag(matrix))
    supports = matrix.sum(axis=1)
    pairs = [
        (int(mistakes[i, j]), int(i), int(j)) for i, j in zip(*mistakes.nonzero(), strict=True)
    ]
    pairs.sort(key=lambda pair: (-pair[0], -pair[0] / supports[pair[1]], pair[1:]))
    return [
        {
            "actual": classes[i],
            "predicted": classes[j],
            "count": count,
            "share": float(count / supports[i]),  # of the actual class's images
        }
        for count, i, j in pairs[:MOST_CONFUSED]
    ]


def _calibration(logits: np.ndarray, labels: np.ndarray, temperature: float) -> dict[str, Any]:
    before, after = softmax(logits), softmax(logits, temperature)
    bins_before, bins_after = (
        reliability_bins(p.max(axis=1), _ranked(p)[:, 0] == labels) for p in (before, after)
    )
    return {
        "temperature": float(temperature),
        "ece_before": calibration_error(bins_before),
        "ece_after": calibration_error(bins_after),
        "ece_by_chance": _ece_by_chance(after.max(axis=1)),
        "brier_before": _brier(before, labels),
        "brier_after": _brier(after, labels),
        "bins": {"before": bins_before, "after": bins_after},
    }


def _bin_index(confidences: np.ndarray) -> np.ndarray:
    # bins are (low, high], as in Guo et al.; a confidence of 0 cannot occur
    return np.ceil(confidences * CALIBRATION_BINS).astype(int).clip(1, CALIBRATION_BINS) - 1


def reliability_bins(confidences: np.ndarray, hits: np.ndarray) -> list[dict[str, Any]]:
    """Set stated confidences (N,) against what came true (N,), in bins of equal width."""
    index = _bin_index(confidences)
    return [
        {
            "low": b / CALIBRATION_BINS,
            "high": (b + 1) / CALIBRATION_BINS,
            "count": int(inside.sum()),
            "confidence": float(confidences[inside].mean()) if inside.any() else None,
            "accuracy": float(hits[inside].mean()) if inside.any() else None,
        }
        for b in range(CALIBRATION_BINS)
        for inside in [index == b]
    ]


def calibration_error(bins: list[dict[str, Any]]) -> float:
    """Give the expected calibration error: mean |accuracy - confidence|, weighted by bin size."""
    filled = [b for b in bins if b["count"]]
    gaps = sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in filled)
    return gaps / sum(b["count"] for b in filled)


def _ece_by_chance(confidences: np.ndarray, draws: int = 100) -> float:
    """Give the ECE that a perfectly calibrated model shows on average with these confidences.

    ECE is biased upwards on few images; hits drawn with the stated probabilities say how much.
    """
    random = np.random.default_rng(0)
    hits = random.random((draws, len(confidences))) < confidences  # (draws, N)
    members = np.eye(CALIBRATION_BINS)[_bin_index(confidences)]  # (N, bins)
    gaps = np.abs((hits - confidences) @ members).sum(axis=1) / len(confidences)  # (draws,)
    return float(gaps.mean())


def _brier(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Give the mean squared distance to the one-hot truth, from 0 to 2 (Brier 1950)."""
    truth = np.eye(probabilities.shape[1])[labels]
    return float(((probabilities - truth) ** 2).sum(axis=1).mean())


def _prediction_row(
    file: str, label: int, probabilities: np.ndarray, ranked: np.ndarray, classes: Sequence[str]
) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(PREDICTION_COLUMNS)
    row |= {
        "file": file,
        "actual": classes[label],
        "predicted": classes[ranked[0]],
        "correct": bool(ranked[0] == label),
        "confidence": float(probabilities[ranked[0]]),
        "actual_probability": float(probabilities[label]),
        "actual_rank": int(np.flatnonzero(ranked == label)[0]) + 1,  # 1: first
    }
    for rank, index in enumerate(ranked[:TOP_COLUMNS], start=1):
        row[f"top{rank}_class"] = classes[index]
        row[f"top{rank}_probability"] = float(probabilities[index])
    return row
