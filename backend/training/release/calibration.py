"""Fits how logits become an answer: temperature and the thresholds of the verdicts."""

import numpy as np
import torch
from torch import Tensor, nn

from app.ml.artifacts import Decision
from training.release.metrics import fit_temperature, softmax

CONFIDENT_PRECISION = 0.95  # share of "confident" answers that should be right
KNOWN_SHARE = 0.97  # share of real dishes that must not be called "not food"


def fit_decision(logits: np.ndarray, labels: np.ndarray, similarities: np.ndarray) -> Decision:
    """From validation logits (N, C), labels (N,) and similarities to the nearest centroid (N,)."""
    temperature = fit_temperature(logits, labels)
    probabilities = softmax(logits, temperature)
    correct = probabilities.argmax(axis=1) == labels
    return Decision(
        temperature=temperature,
        confident_at=_threshold(probabilities.max(axis=1), correct),
        food_at=float(np.quantile(similarities, 1 - KNOWN_SHARE)),
    )


def verdict_shares(
    decision: Decision, logits: np.ndarray, labels: np.ndarray, similarities: np.ndarray
) -> dict[str, dict[str, float | None]]:
    """How often each verdict is given on pictures of known dishes, and how often its answer is
    right; arguments as for `fit_decision`. accuracy: None where a verdict is never given."""
    probabilities = softmax(logits, decision.temperature)
    correct = probabilities.argmax(axis=1) == labels
    is_food = similarities >= decision.food_at
    is_sure = probabilities.max(axis=1) >= decision.confident_at
    given = {"confident": is_food & is_sure, "unsure": is_food & ~is_sure, "not_food": ~is_food}
    return {
        verdict: {
            "share": float(mask.mean()),
            "accuracy": float(correct[mask].mean()) if mask.any() else None,
        }
        for verdict, mask in given.items()
    }


def _threshold(confidences: np.ndarray, correct: np.ndarray) -> float:
    """The lowest confidence from which on upwards enough answers are right; 1 if none is."""
    order = np.argsort(-confidences, kind="stable")
    confidences = confidences[order]
    precision = np.cumsum(correct[order]) / np.arange(1, len(order) + 1)
    ends_tie = np.append(confidences[1:] < confidences[:-1], True)  # equals pass or fail together
    enough = np.flatnonzero((precision >= CONFIDENT_PRECISION) & ends_tie)
    return float(confidences[enough[-1]]) if len(enough) else 1.0


def class_centroids(pooled: Tensor, labels: np.ndarray, num_classes: int) -> Tensor:
    """The mean direction of each class's features, as unit vectors.

    pooled: (N, num_features). Returns (num_classes, num_features); zeros, to which nothing is
    similar, for a class without images.
    """
    directions = nn.functional.normalize(pooled, dim=1)
    sums = torch.zeros(num_classes, pooled.shape[1])
    sums.index_add_(0, torch.from_numpy(labels), directions)
    return nn.functional.normalize(sums, dim=1)
