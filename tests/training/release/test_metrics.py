"""The test's numbers, against formulas, published values and hand-made cases."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.scores import logits_at, logits_for, scored_images

from training.release import calibration
from training.release.calibration import fit_temperature, softmax
from training.release.metrics import (
    PREDICTION_COLUMNS,
    evaluate,
    prediction_rows,
    wilson_interval,
)


@settings(max_examples=150, deadline=None)
@given(scored_images())
def test_property_12_confusion_matrix_is_square_and_rows_sum_to_supports(
    scored: tuple[np.ndarray, np.ndarray, list[str]],
) -> None:
    logits, labels, classes = scored
    results = evaluate(logits, labels, classes)
    matrix = np.array(results["confusion_matrix"])
    assert matrix.shape == (len(classes), len(classes))
    assert matrix.sum(axis=1).tolist() == np.bincount(labels, minlength=len(classes)).tolist()
    assert matrix.sum(axis=1).tolist() == [c["support"] for c in results["per_class"]]
    assert np.trace(matrix) == round(results["top1"] * len(labels))
    assert matrix.sum() == results["num_images"]


@settings(max_examples=100, deadline=None)
@given(scored_images(), st.floats(0.1, 10))
def test_results_are_plain_json_and_within_range(
    scored: tuple[np.ndarray, np.ndarray, list[str]], temperature: float
) -> None:
    results = evaluate(*scored, temperature=temperature)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    low, high = results["top1_ci95"]
    assert 0 <= low <= results["top1"] <= high <= 1
    assert results["top1"] <= results["top5"] <= 1
    assert 0 <= results["balanced_accuracy"] <= 1
    assert 0 <= results["calibration"]["ece_after"] <= 1
    assert 0 <= results["calibration"]["brier_after"] <= 2
    for side in ("before", "after"):
        assert sum(b["count"] for b in results["calibration"]["bins"][side]) == len(scored[1])


def test_top_k_on_hand_made_ranks() -> None:
    # class 0 scores highest, then 1, 2, …; the label's rank is therefore the label
    logits = np.tile(np.arange(7.0)[::-1], (4, 1))
    results = evaluate(logits, np.array([0, 4, 5, 6]), [f"c{i}" for i in range(7)])
    assert (results["top1"], results["top5"]) == (0.25, 0.5)


def test_two_classes_have_a_perfect_top5() -> None:
    results = evaluate(logits_for([0, 1, 0], 2), np.array([1, 0, 1]), ["dal", "dosa"])
    assert (results["top1"], results["top5"]) == (0.0, 1.0)


def test_one_image() -> None:
    results = evaluate(logits_for([2], 3), np.array([2]), ["dal", "dosa", "idli"])
    assert results["top1"] == 1.0
    assert results["top1_ci95"] == pytest.approx([0.2065, 1.0], abs=1e-4)
    assert [c["class_name"] for c in results["worst_classes"]] == ["idli"]


def test_class_scores_by_hand() -> None:
    # dal: 3 images, 2 found; dosa: 1 image, found; one dal is taken for dosa; idli is untested
    logits, labels = logits_for([0, 0, 1, 1], 3), np.array([0, 0, 0, 1])
    results = evaluate(logits, labels, ["dal", "dosa", "idli"])
    dal, dosa, idli = results["per_class"]
    assert (dal["precision"], dal["recall"], dal["f1"]) == pytest.approx((1, 2 / 3, 0.8))
    assert (dosa["precision"], dosa["recall"], dosa["f1"]) == pytest.approx((0.5, 1, 2 / 3))
    assert (idli["precision"], idli["recall"], idli["f1"], idli["support"]) == (None, None, None, 0)
    assert results["macro"]["recall"] == pytest.approx((2 / 3 + 1) / 2)  # idli does not count
    assert results["balanced_accuracy"] == results["macro"]["recall"]
    assert results["weighted"]["recall"] == results["top1"] == pytest.approx(0.75)
    assert [c["class_name"] for c in results["best_classes"]] == ["dal"]
    assert [c["class_name"] for c in results["worst_classes"]] == ["dosa"]
    assert results["most_confused"] == [
        {"actual": "dal", "predicted": "dosa", "count": 1, "share": pytest.approx(1 / 3)}
    ]


def test_best_and_worst_classes_do_not_overlap_when_there_are_enough() -> None:
    labels = np.repeat(np.arange(12), 10)
    answers = [label if i % 10 < label % 11 else 11 for i, label in enumerate(labels)]
    results = evaluate(logits_for(answers, 12), labels, [f"c{i:02}" for i in range(12)])
    best, worst = results["best_classes"], results["worst_classes"]
    assert len(best) == len(worst) == 5
    assert not {c["class_name"] for c in best} & {c["class_name"] for c in worst}
    assert min(c["f1"] for c in best) >= max(c["f1"] for c in worst)


def test_most_confused_pairs_are_sorted_by_count() -> None:
    labels = np.array([0] * 10 + [1] * 4)
    answers = [0] * 5 + [1] * 2 + [2] * 3 + [2] * 3 + [1]
    pairs = evaluate(logits_for(answers, 3), labels, ["a", "b", "c"])["most_confused"]
    assert [(p["actual"], p["predicted"], p["count"]) for p in pairs] == [
        ("b", "c", 3),  # 3 of 4 comes before 3 of 10
        ("a", "c", 3),
        ("a", "b", 2),
    ]


def test_loss_is_the_mean_nll_at_temperature_one() -> None:
    logits = np.array([logits_at(0.8), logits_at(0.6)])
    results = evaluate(logits, np.array([0, 1]), ["a", "b"], temperature=3.0)
    assert results["loss"] == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)


def test_wilson_interval_matches_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@pytest.mark.parametrize(
    ("logits", "labels", "classes", "says"),
    [
        ([[0, 1], [math.nan, 0], [0, math.inf]], [0, 1, 1], "ab", "2 of 3 images.*at index 1"),
        ([[0, 1]], [2], "ab", "from 2 to 2"),
        ([[0, 1]], [-1], "ab", "from -1 to -1"),
        ([[0, 1]], [0, 1], "ab", "do not fit"),
        (np.empty((0, 2)), [], "ab", "at least one image"),
        ([[0, 1]], [0], "abc", "3 class names"),
    ],
)
def test_bad_input_is_one_clear_error(logits: Any, labels: Any, classes: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        evaluate(np.array(logits), np.array(labels, dtype=int), list(classes))
    assert "\n" not in str(error.value)


def test_prediction_rows_stand_beside_their_truth() -> None:
    logits = np.array([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 0.0, 0.0]])
    rows = prediction_rows(
        ["a/1.jpg", Path("b/2.jpg")], np.array([2, 1]), logits, ["a", "b", "c", "d"], 2.0
    )
    probabilities = softmax(logits, 2.0)
    first, second = rows
    assert (first["file"], first["actual"], first["predicted"]) == ("a/1.jpg", "c", "a")
    assert (first["correct"], second["correct"]) == (False, True)
    assert (first["actual_rank"], second["actual_rank"]) == (2, 1)
    assert [first[f"top{k}_class"] for k in (1, 2, 3)] == ["a", "c", "b"]
    assert first["confidence"] == first["top1_probability"] == probabilities[0, 0]
    assert first["actual_probability"] == first["top2_probability"] == probabilities[0, 2]
    assert second["file"] == str(Path("b/2.jpg"))
    assert list(first) == PREDICTION_COLUMNS


def test_places_beyond_the_classes_are_empty() -> None:
    (row,) = prediction_rows(["a.jpg"], np.array([0]), logits_for([0], 2), ["दाल", "dosa"])
    assert (row["actual"], row["top2_class"]) == ("दाल", "dosa")
    assert (row["top3_class"], row["top3_probability"]) == (None, None)


@settings(max_examples=100, deadline=None)
@given(scored_images())
def test_rows_and_results_agree(scored: tuple[np.ndarray, np.ndarray, list[str]]) -> None:
    """Ties included: they go to the lower index, as in argmax."""
    logits, labels, classes = scored
    rows = prediction_rows([f"{i}.jpg" for i in range(len(labels))], labels, logits, classes)
    results = evaluate(logits, labels, classes)
    order = np.argsort(-logits, axis=1, kind="stable")
    assert [r["predicted"] for r in rows] == [classes[i] for i in logits.argmax(axis=1)]
    ranks = [int(np.flatnonzero(order[i] == label)[0]) + 1 for i, label in enumerate(labels)]
    assert [r["actual_rank"] for r in rows] == ranks
    assert np.mean([r["correct"] for r in rows]) == pytest.approx(results["top1"])
    assert np.mean([rank <= 5 for rank in ranks]) == pytest.approx(results["top5"])


def test_many_images_are_scored_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the numbers of the whole, and without its memory."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 7)), rng.integers(0, 7, 200)
    paths, classes = [f"{i}.jpg" for i in range(200)], [f"c{i}" for i in range(7)]
    whole = evaluate(logits, labels, classes, temperature=1.5)
    rows, temperature = (
        prediction_rows(paths, labels, logits, classes),
        fit_temperature(logits, labels),
    )
    monkeypatch.setattr(calibration, "VALUES_AT_ONCE", 50)
    blocks = [len(block) for _, block in calibration.in_blocks(logits)]
    assert max(blocks) == 7 and sum(blocks) == 200
    assert prediction_rows(paths, labels, logits, classes) == rows
    assert fit_temperature(logits, labels) == pytest.approx(temperature, abs=1e-9)
    again = evaluate(logits, labels, classes, temperature=1.5)
    assert again["loss"] == pytest.approx(whole["loss"], abs=1e-12)
    assert {**again, "loss": 0} == {**whole, "loss": 0}


def test_prediction_rows_need_one_path_per_image() -> None:
    with pytest.raises(ValueError, match="1 file paths for 2 labels"):
        prediction_rows(["a.jpg"], np.array([0, 1]), logits_for([0, 1], 2), ["a", "b"])
