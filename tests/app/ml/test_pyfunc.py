"""A column of images in, the predictor's answers out; a bad picture spoils its own row only."""

import base64
from pathlib import Path

import pandas as pd
import pytest
from tests.support.pictures import encoded, photo_like

from app.ml.artifacts import read_record
from app.ml.predictor import FoodPredictor, load_model_for_inference
from app.ml.pyfunc import BATCH_SIZE, FoodTable, _load_pyfunc


def photo(width: int, height: int) -> bytes:
    return encoded(photo_like(width, height), "JPEG")


@pytest.fixture(scope="module")
def predictor(model_dir: Path) -> FoodPredictor:
    return load_model_for_inference(model_dir)


@pytest.fixture(scope="module")
def table(model_dir: Path) -> FoodTable:
    record = {"version": read_record(model_dir).version}
    config = {"record": record, "device": "cpu", "num_threads": 2, "runtime": "torch"}
    return _load_pyfunc(str(model_dir), config)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_each_way_to_give_a_picture_has_the_answer_of_the_predictor(
    top_k: int, predictor: FoodPredictor, table: FoodTable, tmp_path: Path
) -> None:
    picture = photo(300, 200)
    (tmp_path / "lunch.jpg").write_bytes(picture)
    text = base64.encodebytes(picture).decode()  # in lines, as mail and MLflow have it
    cells = [picture, bytearray(picture), text, str(tmp_path / "lunch.jpg")]
    answers = table.predict(pd.DataFrame({"image": cells}, index=list("abcd")), {"top_k": top_k})
    assert list(answers.index) == list("abcd")
    expected = predictor.predict(picture, top_k)
    for row in answers.itertuples():
        assert [one["class_name"] for one in row.top_predictions] == [c for c, _ in expected.top]
        confidences = [one["confidence"] for one in row.top_predictions]
        assert confidences == pytest.approx([p for _, p in expected.top], abs=1e-5)
        assert (row.class_name, row.confidence) == (expected.top[0][0], confidences[0])
        assert row.verdict == expected.verdict and row.error is None


def test_a_bad_picture_has_an_error_in_its_row_and_the_others_their_answers(
    table: FoodTable, tmp_path: Path
) -> None:
    good = photo(64, 64)
    bad = [b"", b"text", None, 7, str(tmp_path), "/no/such.jpg", good[:-200]]
    cells = [cell for pair in zip([good] * len(bad), bad, strict=True) for cell in pair]
    cells += [good] * BATCH_SIZE + bad
    answers = table.predict(pd.DataFrame({"image": cells}))
    failed = [error is not None for error in answers.error]
    assert failed == [False, True] * len(bad) + [False] * BATCH_SIZE + [True] * len(bad)
    for row in answers[failed].itertuples():
        empty = (row.class_name, row.confidence, row.verdict, row.top_predictions)
        assert empty == (None, None, None, []) and row.error
    assert "'/no/such.jpg' is neither a file nor base64" in list(answers.error)


def test_a_table_without_rows_has_an_answer_without_rows(table: FoodTable) -> None:
    answers = table.predict(pd.DataFrame({"image": []}))
    assert len(answers) == 0 and "verdict" in answers.columns


def test_top_k_is_at_most_the_number_of_classes_and_at_least_one(table: FoodTable) -> None:
    picture = pd.DataFrame({"image": [photo(64, 64)]})
    assert len(table.predict(picture, {"top_k": 99}).top_predictions[0]) == 3
    with pytest.raises(ValueError, match="top_k must be 1 or more, not 0"):
        table.predict(picture, {"top_k": 0})
