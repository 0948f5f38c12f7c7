"""The smaller files for LiteRT are kept where they answer the validation photos as well."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.support import standin
from tests.support.released import release_forms
from torch import Tensor

from app.ml.predictor import FoodPredictor, load_model_for_inference
from training.data.splits import FoodData, load_food_data
from training.release import standalone_smaller
from training.release.standalone import Answers, answers_of
from training.release.standalone_smaller import export_smaller


@pytest.fixture
def predictor(tmp_path: Path) -> FoodPredictor:
    with standin.registered():
        release_forms(tmp_path, ["green", "red", "sky"])
        return load_model_for_inference(tmp_path, runtime="torch")


@pytest.fixture(scope="module")
def data(photos: Path) -> FoodData:
    return load_food_data(photos, seed=1)


@pytest.mark.parametrize("worse", ["fp16", "int8", "neither"])
def test_those_that_answer_as_well_are_kept(
    worse: str,
    tmp_path: Path,
    predictor: FoodPredictor,
    data: FoodData,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With converters whose files answer as the version does, or never correctly."""
    wrong = torch.nn.functional.one_hot((torch.from_numpy(data.val.labels) + 1) % 3).float()

    def runner(path: Path) -> Callable[[Tensor], Answers]:
        def run(images: Tensor) -> Answers:
            answers = answers_of(predictor, images)
            return answers._replace(probabilities=wrong) if path == refused else answers

        return run

    monkeypatch.setattr(standalone_smaller, "halved", lambda _: b"fp16")
    monkeypatch.setattr(standalone_smaller, "quantized", lambda *_: b"int8")
    monkeypatch.setattr(standalone_smaller, "litert_runner", runner)
    caplog.set_level("INFO")
    refused = tmp_path / f"food_model_v1.{worse}.tflite"
    kept = [name for name in ("fp16", "int8") if name != worse]
    files = export_smaller(tmp_path / "food_model_v1.tflite", predictor, data, seed=1)
    assert [file.path.name for file in files] == [f"food_model_v1.{name}.tflite" for name in kept]
    for path, _ in files:
        assert path.read_bytes().decode() in path.name
        facts = json.loads(path.with_name(f"{path.name}.json").read_text())
        assert facts["labels"] == predictor.classes
    assert len(list(tmp_path.glob("*.tflite*"))) == 2 * len(kept)
    told = rf"no {refused.name}: -\d+\.\d points against the plain network on 6 validation"
    assert len([line for line in caplog.messages if re.match(told, line)]) == 2 - len(kept)
