"""The benchmark that a person with a GPU runs and pastes; here in its short form."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_the_short_form_shows_everything(photos: Path) -> None:
    command = [sys.executable, BENCHMARK, "--short", "--device", "cpu", "--data_dir", photos]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert (
        len(re.findall(r"mobilenet_v2, batch 4: (?:usual loop|timm), fp32 .* x$", said, re.M)) == 2
    )
    assert re.search(r"\d+ images/s with \d+ readers, \d+% of it waiting", said)
    assert "in 3 updates: 0 values read back, 0 waits" in said
    assert "the weights differ by at most 0;" in said  # on a CPU
    assert "memory that runs out: not tried" in said
    assert len(re.findall(r"photos at once: [18] .* x$", said, re.M)) == 2
    assert "two processes, a whole run on a handful of images: exit code 0" in said
