"""How far to trust an answer: temperature, thresholds and class centroids, and how well they fit.

Everything is fitted on the validation split. Logits are (N, C), labels (N,).
"""

from collections.abc import Iterator
from typing import NamedTuple, TypedDict, get_args

import numpy as np
import torch
from torch import Tensor, nn

from app.ml.artifacts import Decision
from app.ml.drift import Verdict

CONFIDENT_PRECISION = 0.95  # share of "confident" answers that should be right
NEVER = 2.0  # the threshold that no confidence reaches: rounded to float32 some are 1
KNOWN_SHARE = 0.99  # share of real dishes that must not be called "not food"
NUM_BINS = 15  # as in Guo et al. 2017
INVERSE_TEMPERATURES = (0.1, 10.0)
VALUES_AT_ONCE = 1_000_000  # logits that are computed with together: 8 MB in float64


class Bin(TypedDict):
    """The answers whose confidence lies in (low, high]; None where there are none."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


class Calibration(TypedDict):
    """How well stated confidences come true, before and after the temperature.

    ece: expected calibration error; by chance: what a perfectly calibrated model shows on as many
    images. brier: 0 to 2.
    """

    temperature: float
    ece_before: float
    ece_after: float
    ece_by_chance: float
    brier_before: float
    brier_after: float
    bins: dict[str, list[Bin]]


class VerdictShare(TypedDict):
    """How often a verdict is given, and how often its answer is right; None if it never is."""

    share: float
    accuracy: float | None


class Probabilities(NamedTuple):
    """What a temperature makes of each image's logits; each (N,) in float64."""

    confidence: np.ndarray  # of the predicted class
    actual: np.ndarray  # of the actual class
    squares: np.ndarray  # summed over the classes


def checked(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Check that the arrays fit each other and are finite.

    Raises:
        ValueError: they are empty, misshapen, not finite, or of other classes.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not logits.size:
        raise ValueError(
            f"logits of shape {logits.shape} and labels of shape {labels.shape} do not fit; "
            "expected (N, C) and (N,) with at least one image"
        )
    finite = np.concatenate([np.isfinite(block).all(axis=1) for _, block in in_blocks(logits)])
    if not finite.all():
        raise ValueError(
            f"the logits of {(~finite).sum()} of {len(logits)} images are not finite, first at "
            f"index {finite.argmin()}; the model has diverged: train again with a lower "
            "learning rate"
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}, but the logits have "
            f"{logits.shape[1]} classes; use the class map the model was trained with"
        )
    return logits, labels


def in_blocks(logits: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield consecutive rows in float64, few enough that memory does not grow with N times C."""
    rows = max(1, VALUES_AT_ONCE // logits.shape[1])
    for start in range(0, len(logits), rows):
        where = slice(start, start + rows)
        yield where, logits[where].astype(np.float64)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Turn logits into probabilities (N, C) in float64; T > 1 makes them less certain."""
    from scipy import special  # takes a moment, which only a release should pay

    return special.softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1)


def probabilities(
    logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0
) -> Probabilities:
    """Compute what matters of the softmax at a temperature, block by block."""
    found = Probabilities(*(np.empty(len(labels)) for _ in Probabilities._fields))
    for where, block in in_blocks(logits):
        shares = softmax(block, temperature)
        found.confidence[where] = shares.max(axis=1)
        found.actual[where] = shares[np.arange(len(block)), labels[where]]
        found.squares[where] = (shares**2).sum(axis=1)
    return found


# Fitting --------------------------------------------------------------------------------------


def fit_decision(logits: np.ndarray, labels: np.ndarray, similarities: np.ndarray) -> Decision:
    """Fit how logits and similarities to the nearest centroid, (N,), become an answer."""
    temperature = fit_temperature(logits, labels)
    confidence = probabilities(logits, labels, temperature).confidence
    return Decision(
        temperature=temperature,
        confident_at=confidence_threshold(confidence, logits.argmax(axis=1) == labels),
        food_at=float(np.quantile(similarities, 1 - KNOWN_SHARE)),
    )


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Find the temperature that minimizes the validation NLL (Guo et al. 2017, arXiv:1706.04599).

    The NLL is convex in b = 1/T, so its slope has one zero. A unit normal prior around b = 1 weighs
    about as much as one image: it keeps a perfectly separated or tiny set, whose NLL alone would
    ask for T = 0, at a sane value, and vanishes in a set of hundreds. Since it pulls towards T = 1,
    the NLL is never higher than with no temperature at all.
    """
    from scipy.optimize import brentq

    logits, labels = checked(logits, labels)
    actual = logits[np.arange(len(labels)), labels].astype(np.float64)  # (N,)

    def slope(inverse: float) -> float:
        expected = sum(
            (softmax(block, 1 / inverse) * block).sum() for _, block in in_blocks(logits)
        )
        return float(expected - actual.sum() + (inverse - 1))

    low, high = INVERSE_TEMPERATURES
    if slope(low) >= 0:
        return 1 / low
    if slope(high) <= 0:
        return 1 / high
    return float(1 / brentq(slope, low, high, xtol=1e-12))


def confidence_threshold(confidences: np.ndarray, correct: np.ndarray) -> float:
    """Find the lowest confidence above which enough answers are correct; `NEVER` if there is none.

    As many must be expected to be, by the confidences themselves: hits alone are few, and a share
    that was reached by luck would not be reached again.
    """
    order = np.argsort(-confidences, kind="stable")
    confidences = confidences[order]
    expected = np.minimum(np.cumsum(correct[order]), np.cumsum(confidences))
    precision = expected / np.arange(1, len(order) + 1)
    ends_tie = np.append(confidences[1:] < confidences[:-1], True)  # equals pass or fail together
    enough = np.flatnonzero((precision >= CONFIDENT_PRECISION) & ends_tie)
    return float(confidences[enough[-1]]) if len(enough) else NEVER


def class_centroids(pooled: Tensor, labels: np.ndarray, num_classes: int) -> Tensor:
    """Average the directions of each class's features, to unit vectors.

    pooled: (N, num_features). Returns (num_classes, num_features); zeros, to which nothing is
    similar, for a class without images.
    """
    directions = nn.functional.normalize(pooled, dim=1)
    sums = torch.zeros(num_classes, pooled.shape[1])
    sums.index_add_(0, torch.from_numpy(labels), directions)
    return nn.functional.normalize(sums, dim=1)


# Judging --------------------------------------------------------------------------------------


def verdict_shares(
    decision: Decision, logits: np.ndarray, labels: np.ndarray, similarities: np.ndarray
) -> dict[str, VerdictShare]:
    """Count how often each verdict is given on known dishes; arguments as for `fit_decision`."""
    _, verdicts = given_answers(decision, logits, labels, similarities)
    correct = logits.argmax(axis=1) == labels
    given = {verdict: np.array(verdicts) == verdict for verdict in get_args(Verdict)}
    return {
        verdict: {
            "share": float(mask.mean()),
            "accuracy": float(correct[mask].mean()) if mask.any() else None,
        }
        for verdict, mask in given.items()
    }


def given_answers(
    decision: Decision, logits: np.ndarray, labels: np.ndarray, similarities: np.ndarray
) -> tuple[list[float], list[str]]:
    """Return each image's confidence and verdict; arguments as for `fit_decision`."""
    confidence = probabilities(logits, labels, decision.temperature).confidence
    is_sure = np.where(confidence >= decision.confident_at, "confident", "unsure")
    verdicts = np.where(similarities >= decision.food_at, is_sure, "not_food")
    return confidence.tolist(), verdicts.tolist()


def measure_calibration(logits: np.ndarray, labels: np.ndarray, temperature: float) -> Calibration:
    """Measure how well confidences come true, as the logits are and at a temperature."""
    hits = logits.argmax(axis=1) == labels
    before, after = (probabilities(logits, labels, t) for t in (1.0, temperature))
    bins_before, bins_after = (reliability_bins(p.confidence, hits) for p in (before, after))
    return {
        "temperature": float(temperature),
        "ece_before": calibration_error(bins_before),
        "ece_after": calibration_error(bins_after),
        "ece_by_chance": _error_by_chance(after.confidence),
        "brier_before": _brier(before),
        "brier_after": _brier(after),
        "bins": {"before": bins_before, "after": bins_after},
    }


def reliability_bins(confidences: np.ndarray, hits: np.ndarray) -> list[Bin]:
    """Compare stated confidences (N,) with hits (N,), in bins of equal width."""
    index = _bin_index(confidences)
    return [
        _bin(number, confidences[index == number], hits[index == number])
        for number in range(NUM_BINS)
    ]


def _bin(number: int, confidences: np.ndarray, hits: np.ndarray) -> Bin:
    return {
        "low": number / NUM_BINS,
        "high": (number + 1) / NUM_BINS,
        "count": len(hits),
        "confidence": float(confidences.mean()) if len(hits) else None,
        "accuracy": float(hits.mean()) if len(hits) else None,
    }


def _bin_index(confidences: np.ndarray) -> np.ndarray:
    # bins are (low, high], as in Guo et al.; a confidence of 0 cannot occur
    return np.ceil(confidences * NUM_BINS).astype(int).clip(1, NUM_BINS) - 1


def calibration_error(bins: list[Bin]) -> float:
    """Compute the expected calibration error: mean |accuracy - confidence|, weighted by count."""
    gaps = total = 0.0
    for part in bins:
        if part["accuracy"] is not None and part["confidence"] is not None:
            gaps += part["count"] * abs(part["accuracy"] - part["confidence"])
            total += part["count"]
    return gaps / total


def _error_by_chance(confidences: np.ndarray) -> float:
    """Estimate the calibration error that a perfectly calibrated model shows on average.

    It is biased upwards on few images; hits drawn with the stated probabilities say how much.
    """
    rng, index = np.random.default_rng(0), _bin_index(confidences)
    errors = []
    for _ in range(100):
        hits = rng.random(len(confidences)) < confidences
        gaps = np.bincount(index, weights=hits - confidences)
        errors.append(np.abs(gaps).sum() / len(confidences))
    return float(np.mean(errors))


def _brier(found: Probabilities) -> float:
    """Compute the mean squared distance to the one-hot truth, from 0 to 2 (Brier 1950)."""
    return float((found.squares - 2 * found.actual + 1).mean())
