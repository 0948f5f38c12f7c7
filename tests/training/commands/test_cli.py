"""The command line around a training: what is printed to be pasted, and how it ends."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from training.commands import cli
from training.commands.cli import resume_command, shown, started_as


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data_dir", "my photos", "--epochs", "3"],
        ["--resume", "auto", "--data_dir", 'it\'s "food"'],
        ["--resume=old run/checkpoint-000001.pt"],
    ],
)
def test_the_printed_command_can_be_pasted(arguments: list[str]) -> None:
    line = resume_command(["python", "backend/train_model.py"], arguments)
    words = shlex.split(line)
    assert words[-2:] == ["--resume", "auto"] and words.count("--resume") == 1
    kept = [a for a in arguments if not a.startswith("--resume") and a != "auto"]
    assert words[2:-2] == kept


def test_a_password_is_never_printed() -> None:
    line = shown(["python", "t.py", "--tracking_uri", "http://me:s3cret@host"])
    assert "s3cret" not in line and "http://me:***@host" in line


def test_torchrun_is_part_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["train_model.py", "--epochs", "3"])
    assert started_as(2) == ["torchrun", "--nproc_per_node=2", "train_model.py"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert started_as(2)[1:3] == ["--nproc_per_node=2", "--nnodes=2"]


BACKEND = Path(cli.__file__).parents[2]


def run(*arguments: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(BACKEND / "train_model.py"), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "not RANK, MASTER_ADDR, MASTER_PORT: start with torchrun, or unset"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "but not MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment: must be a whole number"),
    ],
)
def test_what_a_launcher_left_behind_is_told_in_one_line(
    environment: dict[str, str], words: str, tmp_path: Path
) -> None:
    result = run("--no_mlflow", "--device", "cpu", cwd=tmp_path, **environment)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1 and words in result.stderr


@pytest.mark.slow
def test_an_empty_variable_is_no_launcher(tmp_path: Path) -> None:
    """Schedulers export them empty; what is wrong then is the data."""
    (tmp_path / "file").write_text("no folder")
    places = ("--data_dir", "file", "--output_dir", "m", "--checkpoint_dir", "c")
    result = run(*places, "--no_mlflow", cwd=tmp_path, WORLD_SIZE="")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "file" in result.stderr.splitlines()[-1] and "WORLD_SIZE" not in result.stderr
