"""Copies of checkpoints on a drive that loses and truncates files."""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training.data.manifest import MANIFEST_NAME
from training.errors import CheckpointError
from training.run import copies as copies_module
from training.run.checkpoints import load_checkpoint, run_folders, save_checkpoint
from training.run.copies import CheckpointCopies, check_mounted


def save(run_dir: Path, epoch: int) -> Path:
    return save_checkpoint(
        run_dir, {"epoch": epoch, "batch": 0, "weight": torch.full((99,), epoch)}
    )


def epochs_in(folder: Path) -> list[int]:
    """The epochs of the checkpoints that verify, oldest first."""
    return [load_checkpoint(path).state["epoch"] for path in sorted(folder.glob("*.pt"))]


@pytest.fixture
def copies(tmp_path: Path) -> CheckpointCopies:
    (tmp_path / "drive").mkdir()
    return CheckpointCopies(tmp_path / "checkpoints", tmp_path / "drive" / "NutriLearn")


def test_two_copies_are_kept_and_come_back_on_an_empty_disk(copies: CheckpointCopies) -> None:
    for epoch in range(1, 6):
        assert copies.copy(save(copies.checkpoint_dir / "run", epoch))
    assert epochs_in(copies.copy_dir / "run") == [4, 5]
    fresh = CheckpointCopies(copies.checkpoint_dir.with_name("fresh"), copies.copy_dir)
    fresh.restore()
    assert epochs_in(fresh.checkpoint_dir / "run") == [5]
    assert fresh.copy(save(fresh.checkpoint_dir / "run", 6))
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
    copies: CheckpointCopies,
    damage: Callable[[bytes], bytes],
    suffix: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for epoch in (1, 2):
        path = save(copies.checkpoint_dir / "run", epoch)
        assert copies.copy(path)
    damaged = copies.copy_dir / "run" / path.with_suffix(suffix).name
    damaged.write_bytes(damage(damaged.read_bytes()))
    fresh = CheckpointCopies(copies.checkpoint_dir.with_name("fresh"), copies.copy_dir)
    fresh.restore()
    assert epochs_in(fresh.checkpoint_dir / "run") == [1]
    assert path.name in caplog.text
    again = save(fresh.checkpoint_dir / "run", 2)  # takes the name of the damaged copy
    assert fresh.copy(again)
    assert epochs_in(copies.copy_dir / "run") == [1, 2]


@pytest.mark.parametrize("seed", range(8))
def test_no_file_that_gets_lost_or_cut_on_the_way_counts_as_a_copy(
    copies: CheckpointCopies, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice, write_well = random.Random(seed), copies_module.write_new

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
    lists, copied_lists = (
        f / "run" / MANIFEST_NAME for f in (copies.checkpoint_dir, copies.copy_dir)
    )
    for epoch in range(1, 9):
        path = save(copies.checkpoint_dir / "run", epoch)
        lists.write_text('{"train": {}}')
        monkeypatch.setattr(copies_module, "write_new", write_badly)
        if copies.copy(path):
            last_copied = epoch
            assert copied_lists.read_bytes() == lists.read_bytes()
        there = epochs_in(copies.copy_dir / "run")  # all of them verify, whatever happened
        assert len(there) <= 2
        assert max(there, default=0) == last_copied
    monkeypatch.setattr(copies_module, "write_new", write_well)
    assert copies.copy(path)
    assert epochs_in(copies.copy_dir / "run")[-1] == 8


def test_a_restore_that_was_killed_is_done_again(copies: CheckpointCopies) -> None:
    path = save(copies.checkpoint_dir / "run", 1)
    assert copies.copy(path)
    path.write_bytes(cut(path.read_bytes()))
    path.with_suffix(".json").unlink()
    copies.restore()
    assert epochs_in(copies.checkpoint_dir / "run") == [1]


def test_a_good_copy_is_not_dropped_for_a_damaged_one(copies: CheckpointCopies) -> None:
    for epoch in (1, 2):
        path = save(copies.checkpoint_dir / "run", epoch)
        assert copies.copy(path)
    (copies.copy_dir / "run" / path.name).write_bytes(b"")
    # One that has not seen the second copy verify.
    later = CheckpointCopies(copies.checkpoint_dir, copies.copy_dir)
    assert later.copy(save(copies.checkpoint_dir / "run", 3))
    assert epochs_in(copies.copy_dir / "run") == [1, 3]


def test_runs_keep_their_order_and_those_still_here_stay(
    copies: CheckpointCopies,
) -> None:
    for name in ("old", "new"):
        assert copies.copy(save(copies.checkpoint_dir / name, 1))
        time.sleep(0.02)
    save(copies.checkpoint_dir / "new", 2)
    copies.restore()
    assert epochs_in(copies.checkpoint_dir / "new") == [1, 2]
    fresh = CheckpointCopies(copies.checkpoint_dir.with_name("fresh"), copies.copy_dir)
    fresh.restore()
    assert [folder.name for folder in run_folders(fresh.checkpoint_dir)] == ["new", "old"]


def test_a_drive_that_is_not_mounted_is_told_before_anything_runs(tmp_path: Path) -> None:
    missing = tmp_path / "drive" / "MyDrive" / "NutriLearn"
    with pytest.raises(CheckpointError, match=r"--checkpoint_copy_dir .* is the drive mounted\?"):
        CheckpointCopies(tmp_path, missing).restore()
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_drive_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "drive").touch()
    with pytest.raises(CheckpointError, match=r"--checkpoint_copy_dir .*drive is a file"):
        check_mounted(tmp_path / "drive")


def test_the_newest_is_copied_in_the_background_and_waited_for_at_the_end(
    copies: CheckpointCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a slow drive takes the first one, three more are written."""
    write, begun, may_end = copies_module.write_new, threading.Event(), threading.Event()

    def slow(path: Path, data: bytes) -> None:
        begun.set()
        may_end.wait(60)
        write(path, data)

    monkeypatch.setattr(copies_module, "write_new", slow)
    for epoch in range(1, 5):
        copies.start_copying(save(copies.checkpoint_dir / "run", epoch))
        begun.wait(60)
    may_end.set()
    copies.close()
    assert epochs_in(copies.copy_dir / "run")[-1] == 4


def test_a_newest_checkpoint_that_never_arrives_is_told(
    copies: CheckpointCopies, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copies_module, "write_new", refuse)
    copies.start_copying(save(copies.checkpoint_dir / "run", 1))
    copies.close()
    assert "the newest checkpoint is only in" in caplog.messages[-1]
    assert not list(copies.copy_dir.glob("run/*"))


def test_the_list_of_images_travels_with_its_checkpoints(copies: CheckpointCopies) -> None:
    path = save(copies.checkpoint_dir / "run", 1)
    path.with_name(MANIFEST_NAME).write_text("{}")
    assert copies.copy(path)
    fresh = CheckpointCopies(copies.checkpoint_dir.with_name("fresh"), copies.copy_dir)
    fresh.restore()
    assert (fresh.checkpoint_dir / "run" / MANIFEST_NAME).read_text() == "{}"
