"""--promote: forwards, backwards, and never to a version that cannot be served."""

import dataclasses
import logging
from pathlib import Path

import pytest
from tests.support.released import release_model
from tests.training.release.test_promotion import release

import train_model
from app.ml.artifacts import CLASS_MAP_NAME, CONFIG_NAME, read_record, weights_name
from training.commands.console import log_release
from training.config import TrainingConfig


def promote(folder: Path, version: str) -> int:
    return train_model.main(["--output_dir", str(folder), "--promote", version])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """v1 of two dishes and v2 of three, which is current."""
    release_model(tmp_path, ["dosa", "idli"])
    release_model(tmp_path, ["dosa", "idli", "jalebi"], seed=1)
    return tmp_path


def test_one_command_leads_back_and_forth(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for version, before in ((1, 2), (2, 1)):
        assert promote(folder, f"v{version}") == 0
        assert read_record(folder) == read_record(folder, version)
        assert f"the way back: --promote v{before}" in caplog.text
    assert promote(folder, "2") == 0
    assert "v2 is the current version already" in caplog.text


def test_a_version_that_is_not_there_or_damaged_is_refused(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = (folder / CONFIG_NAME).read_bytes()
    assert promote(folder, "v7") == 1
    assert "no version 7" in caplog.text
    weights = folder / weights_name(1)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert promote(folder, "v1") == 1
    assert "is damaged" in caplog.text
    assert (folder / CONFIG_NAME).read_bytes() == before


def test_a_damaged_current_version_can_be_left(folder: Path) -> None:
    (folder / CLASS_MAP_NAME).write_text("{}")
    assert promote(folder, "v1") == 0
    assert read_record(folder).version == 1


def test_a_worse_version_is_promoted_by_name_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release(tmp_path, "-" * 20)
    release(tmp_path, "+" * 20)
    assert promote(tmp_path, "v1") == 0
    assert "v1 is worse than v2" in caplog.text
    assert read_record(tmp_path).version == 1


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--compare", "1", "2"], "one at a time"),
        (["--sync_mlflow", "checkpoints/run"], "one at a time"),
        (["--dry_run"], "only training has a dry run"),
    ],
)
def test_it_goes_with_no_other_command(
    more: list[str], reason: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_model.main(["--output_dir", str(folder), "--promote", "v1", *more])
    assert reason in capsys.readouterr().err
    assert read_record(folder).version == 2


def test_a_version_held_back_beside_a_damaged_one_is_still_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run has succeeded; what is wrong with the current version is not its error."""
    caplog.set_level(logging.INFO)
    record = read_record(folder, 1)
    (folder / CLASS_MAP_NAME).write_text("{}")
    scores = {"test_top1": 0.5, "test_top1_ci95": (0.4, 0.6), "test_top5": 1.0, "test_images": 9}
    metrics = {**scores, "test_balanced_accuracy": 0.5}
    config = TrainingConfig(output_dir=folder)
    log_release(dataclasses.replace(record, metrics=metrics), config)
    assert "none is current; to change that: --promote v1" in caplog.text
