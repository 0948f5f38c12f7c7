"""Fitting how logits become an answer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.ml.artifacts import Decision
from training.release.calibration import (
    CONFIDENT_PRECISION,
    KNOWN_SHARE,
    _threshold,
    fit_decision,
    verdict_shares,
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 20).map(lambda n: n / 20), st.sampled_from([True] * 9 + [False])),
        min_size=1,
        max_size=60,
    )
)
def test_the_threshold_is_the_lowest_from_which_on_enough_are_right(
    answers: list[tuple[float, bool]],
) -> None:
    """Ties included: at one confidence there is one fate."""
    confidences, correct = (np.array(column) for column in zip(*answers, strict=True))
    good = [c for c in confidences if correct[confidences >= c].mean() >= CONFIDENT_PRECISION]
    assert _threshold(confidences, correct) == (min(good) if good else 1.0)


def test_if_no_answer_is_right_none_is_confident() -> None:
    assert _threshold(np.array([0.9, 0.8]), np.array([False, False])) == 1.0


def scored(num_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 5, num_images)
    logits = random.normal(size=(num_images, 5)) * 2
    logits[np.arange(num_images), labels] += 3
    return logits, labels


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(0, 10**6))
def test_the_decision_holds_what_it_promises(num_images: int, seed: int) -> None:
    logits, labels = scored(num_images, seed)
    similarities = np.random.default_rng(seed).uniform(-1, 1, num_images)
    decision = fit_decision(logits, labels, similarities)
    assert decision.temperature > 0 and 0 < decision.confident_at <= 1
    share = (similarities >= decision.food_at).mean()
    assert share >= KNOWN_SHARE - 1 / num_images
    assert share < 1 or num_images < 2
    scaled = np.exp(logits / decision.temperature)
    probabilities = scaled / scaled.sum(axis=1, keepdims=True)
    confident = probabilities.max(axis=1) >= decision.confident_at - 1e-12
    if confident.any() and decision.confident_at < 1:
        right = probabilities.argmax(axis=1) == labels
        assert right[confident].mean() >= CONFIDENT_PRECISION


def test_large_logits_do_not_overflow() -> None:
    logits, labels = scored(50, 1)
    decision = fit_decision(logits * 1e4, labels, np.linspace(-1, 1, 50))
    assert np.isfinite([decision.temperature, decision.confident_at, decision.food_at]).all()


def test_the_numbers_are_plain_floats() -> None:
    """They are written as JSON and compared again with what is read back."""
    decision = fit_decision(*scored(30, 2), np.zeros(30))
    assert {type(value) for value in vars(decision).values()} == {float}


@pytest.mark.parametrize("num_images", [1, 2])
def test_few_images_are_enough_for_an_answer(num_images: int) -> None:
    assert fit_decision(*scored(num_images, 0), np.zeros(num_images)).confident_at <= 1


def test_shares_and_accuracies_of_the_verdicts() -> None:
    """Four sure answers of which one is wrong and one is no food; two unsure ones, both right."""
    logits = np.array([[9.0, 0.0]] * 4 + [[0.1, 0.0]] * 2)
    labels = np.array([0, 0, 1, 0, 0, 0])
    similarities = np.array([0.9, 0.9, 0.9, 0.1, 0.9, 0.5])
    decision = Decision(temperature=1.0, confident_at=0.8, food_at=0.5)
    assert verdict_shares(decision, logits, labels, similarities) == {
        "confident": {"share": 0.5, "accuracy": pytest.approx(2 / 3)},
        "unsure": {"share": pytest.approx(1 / 3), "accuracy": 1.0},
        "not_food": {"share": pytest.approx(1 / 6), "accuracy": 1.0},
    }
    everything = Decision(temperature=1.0, confident_at=0.0, food_at=0.0)
    shares = verdict_shares(everything, logits, labels, similarities)
    assert shares["not_food"] == {"share": 0.0, "accuracy": None}
