"""The integer file for LiteRT is kept where it answers the validation photos as well."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.support import standin
from tests.support.released import release_forms
from torch import Tensor

from app.ml.predictor import FoodPredictor, load_model_for_inference
from training.data.splits import FoodData, load_food_data
from training.release import standalone_int8
from training.release.standalone import Answers, ExportError, answers_of
from training.release.standalone_int8 import export_litert_int8


@pytest.fixture
def predictor(tmp_path: Path) -> FoodPredictor:
    with standin.registered():
        release_forms(tmp_path, ["green", "red", "sky"])
        return load_model_for_inference(tmp_path, runtime="torch")


@pytest.fixture(scope="module")
def data(photos: Path) -> FoodData:
    return load_food_data(photos, seed=1)


def export(
    folder: Path,
    predictor: FoodPredictor,
    data: FoodData,
    turned: Callable[[Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """With a converter whose file answers as the version does, its probabilities turned."""

    def run(images: Tensor) -> Answers:
        answers = answers_of(predictor, images)
        return Answers(turned(answers.probabilities), answers.similarity)

    monkeypatch.setattr(standalone_int8, "quantized", lambda *_: b"int8")
    monkeypatch.setattr(standalone_int8, "litert_runner", lambda *_: run)
    plain = folder / "food_model_v1.tflite"
    return export_litert_int8(plain, predictor, data, seed=1).path


def test_one_that_answers_as_well_is_kept(
    tmp_path: Path, predictor: FoodPredictor, data: FoodData, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export(tmp_path, predictor, data, lambda p: p, monkeypatch)
    assert path.read_bytes() == b"int8" and path.name == "food_model_v1.int8.tflite"
    assert json.loads((tmp_path / f"{path.name}.json").read_text())["labels"] == predictor.classes


def test_one_that_is_worse_is_not(
    tmp_path: Path, predictor: FoodPredictor, data: FoodData, monkeypatch: pytest.MonkeyPatch
) -> None:
    correct = torch.nn.functional.one_hot(torch.from_numpy(data.val.labels)).float()
    monkeypatch.setattr(predictor, "logits", lambda *_: correct)
    with pytest.raises(ExportError, match=r"-\d+\.\d points against the plain network on 6 val"):
        export(tmp_path, predictor, data, lambda p: p.roll(1, dims=1), monkeypatch)
    assert not list(tmp_path.glob("*.tflite*"))
