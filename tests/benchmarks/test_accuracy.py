"""The benchmark that compares settings of the recipe: it trains, scores and goes on from there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "accuracy.py"
FLAGS = "--weights none --freeze_layers all --epochs 1 --batch_size 8 --num_workers 0"


def compare(photos: Path, out: Path, setting: str) -> str:
    """Run it with one seed, and score at a second size; return what it printed."""
    folders = ["--data_dir", photos, "--score", photos, "--out", out]
    chosen = [f"--setting={setting}", "--sizes=64/72", "--seeds=1", f"--flags={FLAGS}"]
    command = [sys.executable, BENCHMARK, *folders, *chosen]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    logs = "".join(path.read_text() for path in out.glob("*/*/log"))
    assert done.returncode == 0, done.stderr + logs
    return done.stdout


@pytest.mark.slow
def test_a_setting_is_trained_once_and_scored(photos: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("path,label\n")
    setting = f"small labels={labels} train_crop=64"  # a path, and a field without a flag
    said = compare(photos, tmp_path / "runs", setting)
    table = said[said.index("| setting") :]
    assert re.search(r"^\| small \| 1 \| [01]\.\d{3} ", table, re.M)
    assert re.search(r"^\| small, 64 of 72 \| .* \| [-+]\d.* to .* \|$", table, re.M)
    log = tmp_path / "runs" / "small" / "seed-1" / "log"
    settings = log.read_text()
    assert f"labels={labels} " in settings and " train_crop=64 " in settings
    again = compare(photos, tmp_path / "runs", setting)
    assert again[again.index("| setting") :] == table
    assert log.read_text() == settings
