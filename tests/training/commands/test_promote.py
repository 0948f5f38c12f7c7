"""--promote: forwards, backwards, and never to a version that cannot be served."""

import logging
from pathlib import Path

import pytest
from tests.support.released import release_model
from tests.training.release.test_promotion import release

import train_model
from app.ml.artifacts import CLASS_MAP_NAME, CONFIG_NAME, read_record, weights_name


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


def test_it_goes_with_no_other_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_model.main(["--output_dir", str(folder), "--promote", "v1", "--compare", "1", "2"])
    assert "one at a time" in capsys.readouterr().err
