import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.release import metrics as evaluation
from training.release.metrics import (
    PREDICTION_COLUMNS,
    evaluate,
    fit_temperature,
    prediction_rows,
    softmax,
    wilson_interval,
    write_predictions_csv,
)


@st.composite
def scored_images(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Logits, labels and class names; few images, so that many classes are without any."""
    num_classes, num_images = draw(st.integers(2, 30)), draw(st.integers(1, 60))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.0, 1.0, 50.0]))  # 0: every logit is a tie
    logits = scale * random.normal(size=(num_images, num_classes))
    labels = random.integers(0, num_classes, num_images)
    return logits, labels, [f"class_{i}" for i in range(num_classes)]


def logits_for(answers: list[int], num_classes: int) -> np.ndarray:
    return 4.0 * np.eye(num_classes)[answers]


def logits_at(confidence: float) -> list[float]:
    """Two logits whose softmax gives the first class this probability."""
    return [math.log(confidence / (1 - confidence)), 0.0]


def nll(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    return float(-np.log(softmax(logits, temperature)[np.arange(len(labels)), labels]).mean())


def calibrated(scale: float, num_images: int = 4000, seed: int = 0) -> tuple[Any, Any]:
    """Logits that are `scale` times too large for labels drawn from the true probabilities."""
    random = np.random.default_rng(seed)
    logits = random.normal(scale=2.0, size=(num_images, 8))
    cumulated = softmax(logits).cumsum(axis=1)
    labels = (random.random((num_images, 1)) < cumulated).argmax(axis=1)
    return scale * logits, labels


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
    assert results["weighted"]["recall"] == pytest.approx(0.75)
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


def test_ece_and_brier_by_hand() -> None:
    # at 0.9: right and wrong, accuracy 0.5, gap 0.4; at 0.7: right, gap 0.3
    logits = np.array([logits_at(0.9), logits_at(0.9), logits_at(0.7)])
    calibration = evaluate(logits, np.array([0, 1, 0]), ["a", "b"])["calibration"]
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
    classes = [str(i) for i in range(8)]
    few, many = (
        evaluate(*calibrated(1.0, number), classes)["calibration"] for number in (100, 10_000)
    )
    assert few["ece_by_chance"] > 4 * many["ece_by_chance"]
    assert many["ece_before"] == pytest.approx(many["ece_by_chance"], rel=0.6)


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


def test_prediction_rows_stand_beside_their_truth(tmp_path: Path) -> None:
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

    write_predictions_csv(tmp_path / "predictions.csv", rows)
    with (tmp_path / "predictions.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == PREDICTION_COLUMNS
    assert read == [{key: str(value) for key, value in row.items()} for row in rows]


def test_prediction_csv_takes_two_classes_and_awkward_file_names(tmp_path: Path) -> None:
    paths = ['comma, quote" and\nnewline.jpg', "not-\udcff-text.jpg"]
    rows = prediction_rows(paths, np.array([0, 1]), logits_for([0, 1], 2), ["दाल", "dosa"])
    write_predictions_csv(tmp_path / "p.csv", rows)
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert read[0]["file"] == paths[0]
    assert read[1]["file"] == "not-\\udcff-text.jpg"
    assert (read[0]["actual"], read[0]["top3_class"]) == ("दाल", "")


def test_prediction_rows_need_one_path_per_image() -> None:
    with pytest.raises(ValueError, match="1 file paths for 2 labels"):
        prediction_rows(["a.jpg"], np.array([0, 1]), logits_for([0, 1], 2), ["a", "b"])


def test_evaluation_imports_nothing_of_ours() -> None:
    source = Path(evaluation.__file__).read_text(encoding="utf-8")
    assert "from app" not in source
    assert "from training" not in source
