"""Drift: how far served answers have moved from those to the validation photos."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.ml.drift import AnswerSummary, stability_index, sum_up

CONFIDENCES = st.lists(st.floats(0, 1), min_size=1, max_size=60)


def test_answers_are_summed_up_by_hand() -> None:
    found = sum_up([0.05, 0.95, 1.0, 0.5], ["not_food", "confident", "confident", "unsure"])
    assert found["count"] == 4
    assert found["mean_confidence"] == pytest.approx(0.625)
    assert found["verdicts"] == {"confident": 0.5, "unsure": 0.25, "not_food": 0.25}
    assert found["confidences"] == [0.25, 0, 0, 0, 0, 0.25, 0, 0, 0, 0.5]


@settings(max_examples=150, deadline=None)
@given(CONFIDENCES, CONFIDENCES)
def test_the_index_is_finite_symmetric_in_kind_and_zero_for_the_same(
    one: list[float], two: list[float]
) -> None:
    a, b = (sum_up(c, ["unsure"] * len(c)) for c in (one, two))
    assert sum(a["confidences"]) == pytest.approx(1)
    assert stability_index(a, a) == 0
    assert 0 <= stability_index(a, b) < 100
    assert stability_index(a, b) == pytest.approx(stability_index(b, a))


def test_chance_rarely_reaches_the_alarm_and_a_shift_always_does() -> None:
    """200 answers drawn as 200 validation photos were, and 200 of a model that is less sure."""
    rng = np.random.default_rng(0)

    def drawn(a: int, b: int) -> AnswerSummary:
        return sum_up(rng.beta(a, b, 200).tolist(), ["unsure"] * 200)

    chance = [stability_index(drawn(5, 2), drawn(5, 2)) for _ in range(300)]
    shift = [stability_index(drawn(5, 2), drawn(3, 3)) for _ in range(100)]
    assert np.mean(np.array(chance) > 0.25) < 0.01
    assert min(shift) > 0.25
