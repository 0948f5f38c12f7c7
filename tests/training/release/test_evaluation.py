"""Choosing the forms of a model that are as good as the plain network."""

import dataclasses

import numpy as np
import pytest
import torch
from tests.support.scores import logits_for

from app.ml.predictor import Runtime
from training.data.splits import Split
from training.release.evaluation import (
    FormComparison,
    Predictions,
    compared,
    fit_all,
    fitted,
    some_of,
)


@pytest.mark.parametrize(
    ("gained", "lost", "total", "is_worse"),
    [
        (0, 0, 200, False),
        (9, 0, 200, False),
        (0, 2, 200, False),  # one point
        (0, 3, 200, True),  # one and a half
        (60, 65, 1000, False),  # half a point, by chance
        (0, 6, 1000, True),  # little, and more than chance explains
        (0, 5, 1000, False),
        (6, 0, 1000, False),
        (0, 1, 9, True),
        (1, 1, 9, False),
    ],
)
def test_a_form_may_lose_a_point_and_what_chance_explains(
    gained: int, lost: int, total: int, is_worse: bool
) -> None:
    assert FormComparison(gained, lost, total).is_worse == is_worse


def test_a_comparison_says_by_how_much() -> None:
    assert str(FormComparison(gained=1, lost=4, total=200)) == (
        "-1.5 points against the plain network on 200 validation images "
        "(1 answer gained, 4 lost, p = 0.38)"
    )


LABELS = np.repeat(np.arange(4), 25)


def predictions(answers: list[int]) -> Predictions:
    pooled = torch.eye(4)[torch.from_numpy(LABELS)] + 0.01
    paths = [f"{i}.jpg" for i in range(len(LABELS))]
    return Predictions(paths, LABELS, logits_for(answers, 4), pooled, skipped={})


def test_the_same_images_are_compared_one_by_one() -> None:
    right = LABELS.tolist()
    first_two_wrong, last_wrong = [1, 1, *right[2:]], [*right[:-1], 0]
    assert compared(predictions(first_two_wrong), predictions(last_wrong)) == FormComparison(
        2, 1, 100
    )


def test_a_form_that_is_worse_or_cannot_answer_is_missing_and_the_others_are_fitted() -> None:
    right = LABELS.tolist()
    worse = predictions([(answer + 1) % 4 for answer in right[:2]] + right[2:])
    not_finite = dataclasses.replace(worse, logits=np.full((100, 4), np.nan))
    plain = predictions(right)
    for answers, reason in ((worse, "-2.0 points"), (not_finite, "its answers cannot be used")):
        missing: dict[Runtime, str] = {}
        both: dict[Runtime, Predictions] = {"torch": plain, "int8": answers}
        fits = fit_all(both, both, 4, missing)
        assert list(fits) == ["torch"] and reason in missing["int8"]
    both = {"torch": plain, "int8": plain}
    fits = fit_all(both, both, 4, missing := {})
    assert not missing and fits["int8"].comparison == FormComparison(0, 0, 100)
    assert fits["int8"].decision == fitted(plain, plain, 4).decision
    assert fits["torch"].comparison is None


def test_some_images_are_the_same_for_a_seed_and_of_all_classes() -> None:
    split = Split(tuple(f"{i:03}.jpg" for i in range(100)), LABELS)
    some = some_of(split, 20, seed=1)
    assert some == some_of(split, 20, seed=1) != some_of(split, 20, seed=2)
    assert len(set(some)) == 20 and list(some) == sorted(some)
    assert {LABELS[int(path[:3])] for path in some} == {0, 1, 2, 3}
    assert some_of(split, 200, seed=1) == split.paths
