"""--weights vN: the head grows for new dishes and keeps what it knew."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from tests.support import standin
from tests.support.released import release_model

import train_model
from app.ml.artifacts import NoModelError, read_state, weights_name
from app.ml.model import build_model, head_linear
from training.config import TrainingConfig
from training.errors import ConfigError
from training.run.start import copy_start, start_file


@pytest.fixture(autouse=True)
def small_backbone() -> None:
    standin.register()


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    release_model(tmp_path, ["dosa", "idli", "jalebi"], standin.NAME, seed=3)
    return TrainingConfig(
        model_name=standin.NAME, output_dir=tmp_path, weights="v1", freeze_layers=0
    )


def test_each_dish_keeps_its_part_of_the_head(config: TrainingConfig) -> None:
    record = train_model.ModelRecord.from_json(
        (config.output_dir / "food_model_v1.json").read_text(encoding="utf-8")
    )
    before = read_state(config.output_dir, record)
    grown = {"chole": 0, "jalebi": 1, "samosa": 2, "dosa": 3, "idli": 4}
    model, _, _ = train_model.load_model(config, grown, pretrained=True)
    head = head_linear(model, standin.NAME)
    fresh = torch.manual_seed(config.seed) and build_model(standin.NAME, len(grown))
    for name, index in grown.items():
        kept = record.class_to_idx.get(name)
        old_weight, old_bias = [v for k, v in before.items() if v.shape[:1] == (3,)]
        if kept is None:
            assert torch.equal(head.weight[index], head_linear(fresh, standin.NAME).weight[index])
        else:
            assert torch.equal(head.weight[index], old_weight[kept])
            assert torch.equal(head.bias[index], old_bias[kept])
    body = {name: value for name, value in model.state_dict().items() if value.shape[:1] != (5,)}
    assert body
    assert all(torch.equal(value, before[name]) for name, value in body.items())


def test_what_it_keeps_and_loses_is_said(
    config: TrainingConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train_model.load_model(config, {"dosa": 0, "samosa": 1}, pretrained=True)
    assert "weights of v1: 1 dishes kept, 1 new" in caplog.text
    assert "the new version will not know them: idli, jalebi" in caplog.text


def test_a_version_of_another_backbone_or_none_is_refused(config: TrainingConfig) -> None:
    other = dataclasses.replace(config, model_name="mobilenet_v2")
    with pytest.raises(ConfigError, match=f"add --model_name {standin.NAME}"):
        train_model.load_model(other, {"dosa": 0, "idli": 1}, pretrained=True)
    missing = dataclasses.replace(config, weights="v7")
    with pytest.raises(NoModelError, match="no version 7"):
        train_model.load_model(missing, {"dosa": 0, "idli": 1}, pretrained=True)


def test_a_file_and_a_word_mean_what_they_did(config: TrainingConfig) -> None:
    assert start_file(config) == config.output_dir / weights_name(1)
    assert start_file(dataclasses.replace(config, weights="none")) == Path("none")
    path = str(config.output_dir / weights_name(1))
    by_path = dataclasses.replace(config, weights=path)
    model, _, _ = train_model.load_model(by_path, {"dosa": 0, "idli": 1}, pretrained=True)
    assert head_linear(model, standin.NAME).out_features == 2  # and new


def test_a_dry_run_finds_the_version_in_its_own_folder(
    config: TrainingConfig, tmp_path: Path
) -> None:
    elsewhere = dataclasses.replace(config, output_dir=tmp_path / "dry" / "models")
    copy_start(config, elsewhere.output_dir)
    model, _, _ = train_model.load_model(elsewhere, {"dosa": 0, "idli": 1}, pretrained=True)
    assert model
