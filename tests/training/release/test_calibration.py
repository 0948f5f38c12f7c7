"""Fitting how logits become an answer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.scores import calibrated, logits_at, logits_for, scored_images

from app.ml.artifacts import Decision
from training.release.calibration import (
    CONFIDENT_PRECISION,
    KNOWN_SHARE,
    NEVER,
    confidence_threshold,
    fit_decision,
    fit_temperature,
    measure_calibration,
    softmax,
    verdict_shares,
)
from training.release.metrics import evaluate


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 20).map(lambda n: n / 20.01), st.sampled_from([True] * 9 + [False])
        ),
        min_size=1,
        max_size=60,
    )
)
def test_the_threshold_is_the_lowest_from_which_on_enough_are_right_and_meant_to_be(
    answers: list[tuple[float, bool]],
) -> None:
    """Ties included: at one confidence there is one fate."""
    confidences, correct = (np.array(column) for column in zip(*answers, strict=True))
    good = [
        c
        for c in confidences
        if correct[confidences >= c].mean() >= CONFIDENT_PRECISION
        and confidences[confidences >= c].mean() >= CONFIDENT_PRECISION
    ]
    assert confidence_threshold(confidences, correct) == (min(good) if good else NEVER)


def test_if_no_answer_is_right_none_is_confident() -> None:
    assert confidence_threshold(np.array([0.9, 0.8]), np.array([False, False])) == NEVER


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
    assert decision.temperature > 0 and 0 < decision.confident_at <= NEVER
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
    assert fit_decision(*scored(num_images, 0), np.zeros(num_images)).confident_at <= NEVER


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


# The temperature ------------------------------------------------------------------------------


def nll(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    return float(-np.log(softmax(logits, temperature)[np.arange(len(labels)), labels]).mean())


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_temperature_recovers_a_known_scale(scale: float) -> None:
    assert fit_temperature(*calibrated(scale)) == pytest.approx(scale, rel=0.05)


@settings(max_examples=100, deadline=None)
@given(scored_images())
def test_temperature_never_worsens_the_nll_it_was_fitted_on(
    scored: tuple[np.ndarray, np.ndarray, list[str]],
) -> None:
    logits, labels, _ = scored
    logits = logits / 10  # keep probabilities above 0, so that NLLs are finite
    temperature = fit_temperature(logits, labels)
    assert 0.1 <= temperature <= 10
    assert nll(logits, labels, temperature) <= nll(logits, labels, 1.0) + 1e-9


def test_perfectly_separated_validation_does_not_collapse() -> None:
    labels = np.arange(50) % 5
    assert 0.3 < fit_temperature(logits_for(labels.tolist(), 5), labels) < 1
    assert 0.3 < fit_temperature(logits_for([1], 2), np.array([1])) < 1


def test_softmax_survives_large_logits() -> None:
    probabilities = softmax(np.array([[1e4, 0.0, -1e4]], dtype=np.float32))
    assert probabilities.tolist() == [[1.0, 0.0, 0.0]]


# Judging --------------------------------------------------------------------------------------


def test_ece_and_brier_by_hand() -> None:
    # at 0.9: right and wrong, accuracy 0.5, gap 0.4; at 0.7: right, gap 0.3
    logits = np.array([logits_at(0.9), logits_at(0.9), logits_at(0.7)])
    calibration = measure_calibration(logits, np.array([0, 1, 0]), 1.0)
    assert calibration["ece_before"] == pytest.approx((2 * 0.4 + 0.3) / 3)
    assert calibration["brier_before"] == pytest.approx((2 * 0.1**2 + 2 * 0.9**2 + 2 * 0.3**2) / 3)
    filled = [b for b in calibration["bins"]["before"] if b["count"]]
    assert [(b["count"], b["accuracy"]) for b in filled] == [(1, 1.0), (2, 0.5)]
    assert [b["confidence"] for b in filled] == pytest.approx([0.7, 0.9])
    assert all(b["low"] < b["confidence"] <= b["high"] for b in filled)


def test_temperature_changes_confidence_but_no_score() -> None:
    logits, labels = calibrated(scale=3.0)
    classes = [str(i) for i in range(8)]
    plain = evaluate(logits, labels, classes)
    tempered = evaluate(logits, labels, classes, temperature=3.0)
    assert tempered["confusion_matrix"] == plain["confusion_matrix"]
    calibration = tempered["calibration"]
    assert calibration["ece_before"] == plain["calibration"]["ece_before"] > 0.1
    assert calibration["ece_after"] < 0.04
    assert calibration["brier_after"] < calibration["brier_before"]


def test_ece_by_chance_says_how_much_few_images_show() -> None:
    few, many = (measure_calibration(*calibrated(1.0, number), 1.0) for number in (100, 10_000))
    assert few["ece_by_chance"] > 4 * many["ece_by_chance"]
    assert many["ece_before"] == pytest.approx(many["ece_by_chance"], rel=0.6)
