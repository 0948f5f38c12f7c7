"""Copies of checkpoints on a Drive that loses and cuts files."""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from training import drive_copy
from training.drive_copy import Copies, main, run_beside
from training.run.checkpoints import load_checkpoint, run_folders, save_checkpoint


def save(run_dir: Path, epoch: int) -> Path:
    return save_checkpoint(
        run_dir, {"epoch": epoch, "batch": 0, "weight": torch.full((99,), epoch)}
    )


def epochs_in(folder: Path) -> list[int]:
    """The epochs of the checkpoints that verify, oldest first."""
    return [load_checkpoint(path).state["epoch"] for path in sorted(folder.glob("*.pt"))]


@pytest.fixture
def copies(tmp_path: Path) -> Copies:
    (tmp_path / "drive").mkdir()
    return Copies(tmp_path / "checkpoints", tmp_path / "drive" / "NutriLearn")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Put the signal handlers back that `run_beside` replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_two_copies_are_kept_and_come_back_on_an_empty_disk(copies: Copies) -> None:
    for epoch in range(1, 6):
        save(copies.checkpoint_dir / "run", epoch)
        assert copies.bring_level()
    assert epochs_in(copies.copy_dir / "run") == [4, 5]
    fresh = Copies(copies.checkpoint_dir.with_name("fresh"), copies.copy_dir)
    fresh.restore()
    assert epochs_in(fresh.checkpoint_dir / "run") == [5]
    save(fresh.checkpoint_dir / "run", 6)
    assert fresh.bring_level()
    assert epochs_in(copies.copy_dir / "run") == [5, 6]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    return data[:20] + bytes([data[20] ^ 1]) + data[21:]  # in the manifest: of its SHA-256


def empty(data: bytes) -> bytes:
    return data[:0]


@pytest.mark.parametrize("damage", [cut, flip, empty])
@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_a_copy_damaged_later_is_named_and_the_one_before_comes_back(
    copies: Copies, damage: Callable[[bytes], bytes], suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    for epoch in (1, 2):
        path = save(copies.checkpoint_dir / "run", epoch)
        copies.bring_level()
    damaged = copies.copy_dir / "run" / path.with_suffix(suffix).name
    damaged.write_bytes(damage(damaged.read_bytes()))
    fresh = Copies(copies.checkpoint_dir.with_name("fresh"), copies.copy_dir)
    fresh.restore()
    assert epochs_in(fresh.checkpoint_dir / "run") == [1]
    assert path.name in caplog.text
    save(fresh.checkpoint_dir / "run", 2)  # takes the name of the damaged copy
    assert fresh.bring_level()
    assert epochs_in(copies.copy_dir / "run") == [1, 2]


@pytest.mark.parametrize("seed", range(8))
def test_no_file_that_gets_lost_or_cut_on_the_way_counts_as_a_copy(
    copies: Copies, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice, write_well = random.Random(seed), drive_copy.write_new

    def write_badly(path: Path, data: bytes) -> None:
        write_well(path, data)
        fate = dice.choice(["well", "lost", "cut", "refused"])
        if fate == "lost":
            path.unlink()
        elif fate == "cut":
            path.write_bytes(cut(data))
        elif fate == "refused":
            raise OSError(5, "Input/output error", str(path))

    last_copied = 0
    for epoch in range(1, 9):
        save(copies.checkpoint_dir / "run", epoch)
        monkeypatch.setattr(drive_copy, "write_new", write_badly)
        if copies.bring_level():
            last_copied = epoch
        there = epochs_in(copies.copy_dir / "run")  # all of them verify, whatever happened
        assert len(there) <= 2
        assert max(there, default=0) == last_copied
    monkeypatch.setattr(drive_copy, "write_new", write_well)
    assert copies.bring_level()
    assert epochs_in(copies.copy_dir / "run")[-1] == 8


def test_a_good_copy_is_not_dropped_for_a_damaged_one(copies: Copies) -> None:
    for epoch in (1, 2):
        path = save(copies.checkpoint_dir / "run", epoch)
        copies.bring_level()
    (copies.copy_dir / "run" / path.name).write_bytes(b"")
    later = Copies(copies.checkpoint_dir, copies.copy_dir)  # has not seen the second one verify
    save(copies.checkpoint_dir / "run", 3)
    assert later.bring_level()
    assert epochs_in(copies.copy_dir / "run") == [1, 3]


def test_runs_keep_their_order_and_those_still_here_are_left_alone(copies: Copies) -> None:
    for name in ("old", "new"):
        save(copies.checkpoint_dir / name, 1)
        copies.bring_level()
        time.sleep(0.02)
    save(copies.checkpoint_dir / "new", 2)
    copies.restore()
    assert epochs_in(copies.checkpoint_dir / "new") == [1, 2]
    fresh = Copies(copies.checkpoint_dir.with_name("fresh"), copies.copy_dir)
    fresh.restore()
    assert [folder.name for folder in run_folders(fresh.checkpoint_dir)] == ["new", "old"]


def test_a_drive_that_is_not_mounted_is_said_before_anything_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ran = tmp_path / "ran"
    command = [sys.executable, "-c", f"open({str(ran)!r}, 'w')"]
    missing = tmp_path / "drive" / "MyDrive" / "NutriLearn"
    assert main([str(tmp_path / "checkpoints"), str(missing), "--", *command]) == 1
    assert "is the Drive mounted?" in caplog.text
    assert not ran.exists()


def test_the_command_has_its_exit_code_and_a_signal_reaches_it_once(
    copies: Copies, tmp_path: Path
) -> None:
    ready = tmp_path / "ready"
    code = (
        "import pathlib, signal, sys, time\n"
        "got = []\n"
        "signal.signal(signal.SIGINT, lambda *_: got.append(1))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "end = time.monotonic() + 60\n"
        "while not got and time.monotonic() < end: time.sleep(0.05)\n"
        "time.sleep(0.2)\n"
        "sys.exit(len(got) + 40)\n"
    )

    def interrupt() -> None:
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert run_beside([sys.executable, "-c", code], copies) == 41


def test_a_new_checkpoint_is_copied_while_the_command_still_runs(
    copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive_copy, "POLL_SECONDS", 0.05)
    path = save(copies.checkpoint_dir / "run", 1)
    copied = copies.copy_dir / "run" / path.with_suffix(".json").name
    code = (
        "import pathlib, sys, time\n"
        f"copy, end = pathlib.Path({str(copied)!r}), time.monotonic() + 60\n"
        "while not copy.exists() and time.monotonic() < end: time.sleep(0.05)\n"
        "sys.exit(7 if copy.exists() else 8)\n"
    )
    assert run_beside([sys.executable, "-c", code], copies) == 7
