"""Logits and labels for the tests that score, calibrate and report them."""

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

from training.release.calibration import softmax


@st.composite
def scored_images(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Logits, labels and class names; few images, so that many classes are without any."""
    num_classes, num_images = draw(st.integers(2, 30)), draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.0, 1.0, 50.0]))  # 0: every logit is a tie
    logits = scale * rng.normal(size=(num_images, num_classes))
    labels = rng.integers(0, num_classes, num_images)
    return logits, labels, [f"class_{i}" for i in range(num_classes)]


def logits_for(answers: list[int], num_classes: int) -> np.ndarray:
    return 4.0 * np.eye(num_classes)[answers]


def logits_at(confidence: float) -> list[float]:
    """Two logits whose softmax gives the first class this probability."""
    return [math.log(confidence / (1 - confidence)), 0.0]


def calibrated(scale: float, num_images: int = 4000, seed: int = 0) -> tuple[Any, Any]:
    """Logits that are `scale` times too large for labels drawn from the true probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2.0, size=(num_images, 8))
    cumulated = softmax(logits).cumsum(axis=1)
    labels = (rng.random((num_images, 1)) < cumulated).argmax(axis=1)
    return scale * logits, labels
