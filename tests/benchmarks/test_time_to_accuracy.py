"""The benchmark that trains in four ways, an epoch each in turn; here for two short epochs."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.runs import draw_photos

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "time_to_accuracy.py"
HAS_FASTAI = importlib.util.find_spec("fastai") is not None
EPOCH = r"^seed 7  (\w+) +epoch +(\d)  +(\d+\.\d) s  top-1 ([01]\.\d{3})$"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What it prints; an accuracy of 0 is reached after the first epoch, one of 2 never."""
    photos = draw_photos(tmp_path_factory.mktemp("data") / "photos", per_class=20)
    command = [sys.executable, BENCHMARK, "--data_dir", photos, "--score", photos]
    command += ["--epochs", "2", "--seeds", "7", "--accuracy", "0", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def row(said: str, table: str, name: str) -> list[str]:
    lines = said[said.index(f"\n{table} ") :].splitlines()
    return next(line for line in lines if line.startswith(f"{name}  ")).split("  ", 1)[1].split()


@pytest.mark.slow
def test_the_sides_take_turns_and_are_compared(said: str) -> None:
    sides = ["plain", "ours", "timm", *["fastai"] * HAS_FASTAI]
    epochs = re.findall(EPOCH, said, re.M)
    assert [(name, number) for name, number, *_ in epochs] == [
        *((name, "1") for name in sides),
        *((name, "2") for name in reversed(sides)),
    ]
    first = {name: float(seconds) for name, number, seconds, _ in epochs if number == "1"}
    for table in ("seed 7", "medians"):
        assert row(said, table, "best top-1") == [
            max(accuracy for name, *_, accuracy in epochs if name == side) for side in sides
        ]
        cells = re.findall(r"(\S+) s +(\S+) x", " ".join(row(said, table, "0")))
        assert [float(seconds) for seconds, _ in cells] == list(first.values())
        shown, ours = 0.05, first["ours"]  # what a shown number may be away from the computed one
        for seconds, times in cells:
            least = (float(seconds) - shown) / (ours + shown)
            most = (float(seconds) + shown) / (ours - shown)
            assert least - shown <= float(times) <= most + shown
        assert row(said, table, "2") == ["-", "s", "-", "x"] * len(sides)
        assert [side for side in sides if f"\nbest of {side} " in said] == [
            side for side in sides if side != "ours"
        ]


@pytest.mark.slow
@pytest.mark.skipif(HAS_FASTAI, reason="fastai is installed")
def test_without_fastai_one_line_says_how_to_get_it(said: str) -> None:
    assert "fastai is left out, it is not installed: pip install fastai\n" in said
