"""Real CPU quotas, where this user may set them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def cpu_group(cores: float) -> Iterator[Path]:
    """Make a control group (version 1) of so many cores' time; skips where that is not allowed."""
    folder = Path("/sys/fs/cgroup/cpu") / f"nutrilearn-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("needs the right to make a control group of version 1")
    try:
        (folder / "cpu.cfs_quota_us").write_text(str(round(cores * 100_000)))
        yield folder
    finally:
        folder.rmdir()
