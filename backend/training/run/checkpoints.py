"""Checkpoints that survive anything: written whole or not at all, checked before they are used.

A checkpoint is `checkpoint-NNNNNN.pt` and, written after it, `checkpoint-NNNNNN.json` with its size
and SHA-256. The two newest of a run that verify are kept. A file that does not verify is named and
skipped; it is removed once two newer ones verify, like any other.
"""

import contextlib
import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.ml.artifacts import state_bytes
from app.ml.durable import write_durably
from training.errors import CheckpointError

KEEP = 2
FORMAT_VERSION = 3  # 3: the lists of images are in images.json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: where it is, and the state that was saved."""

    path: Path
    state: dict[str, Any]


def save_checkpoint(run_dir: Path, state: dict[str, Any]) -> Path:
    """Write the next checkpoint of a run durably; only then drop the older ones.

    Raises:
        OSError: no space or no permission; what was there is untouched.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = _path(run_dir, max(_numbers(run_dir), default=0) + 1)
    data = state_bytes({"format_version": FORMAT_VERSION, **state})
    manifest = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest |= {"epoch": state["epoch"], "batch": state["batch"]}
    try:
        write_durably(path, data)
        write_durably(path.with_suffix(".json"), json.dumps(manifest).encode())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    try:
        _drop_old(run_dir)
    except OSError as error:
        logger.warning("old checkpoints cannot be removed: %s", error)
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check one checkpoint.

    Raises:
        CheckpointError: missing, incomplete, damaged or of another format.
    """
    state = torch.load(io.BytesIO(_read_verified(path)), map_location="cpu", weights_only=True)
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written by another version of this program (format "
            f"{state.get('format_version')}, this one reads {FORMAT_VERSION}); finish the run with "
            "that version, or start a new one"
        )
    return Checkpoint(path, state)


def _read_verified(path: Path) -> bytes:
    manifest_path = path.with_suffix(".json")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or hashlib.sha256(data).hexdigest() != manifest.get("sha256"):
        raise CheckpointError(f"{path} is damaged: it is not what {manifest_path.name} says")
    return data


def newest_checkpoint(
    run_dirs: Iterable[Path], usable: Callable[[Path, dict[str, Any]], str | None]
) -> Checkpoint | None:
    """Find the newest checkpoint that verifies and can be used, in the first of these runs that has
    one; each one skipped is named with the reason.

    usable: (run folder, state) -> None, or the reason why not.
    """
    for run_dir in run_dirs:
        for number in sorted(_numbers(run_dir), reverse=True):
            path = _path(run_dir, number)
            try:
                checkpoint = load_checkpoint(path)
            except CheckpointError as error:
                logger.warning("skipped: %s", error)
                continue
            if (reason := usable(run_dir, checkpoint.state)) is None:
                return checkpoint
            logger.warning("skipped %s: %s", path, reason)
    return None


def run_folders(checkpoint_dir: Path) -> list[Path]:
    """List the folders that hold checkpoints, the one written to last first."""
    folders = {path.parent for path in checkpoint_dir.glob("*/checkpoint-*.pt")}
    return sorted(folders, key=_last_written, reverse=True)


def _last_written(run_dir: Path) -> tuple[int, str]:
    times = [0]
    for path in run_dir.glob("checkpoint-*.pt"):
        with contextlib.suppress(FileNotFoundError):  # its run, if it goes on, drops old ones
            times.append(path.stat().st_mtime_ns)
    return max(times), run_dir.name


def _path(run_dir: Path, number: int) -> Path:
    return run_dir / f"checkpoint-{number:06d}.pt"


def _numbers(run_dir: Path) -> list[int]:
    found = (re.fullmatch(r"checkpoint-(\d{6})\.pt", p.name) for p in run_dir.glob("*.pt"))
    return [int(match[1]) for match in found if match]


def _drop_old(run_dir: Path) -> None:
    """Drop what is older than the last two that verify, and what a killed writer left behind.

    The newest was just written, and nothing is older than the oldest: neither need be read.
    """
    newest, *older = sorted(_numbers(run_dir), reverse=True)
    verified = [newest]
    for number in older:
        path = _path(run_dir, number)
        if len(verified) == KEEP:
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        elif number != older[-1] and _verifies(path):
            verified.append(number)
    for leftover in run_dir.glob(".checkpoint-*.tmp"):
        leftover.unlink(missing_ok=True)


def _verifies(path: Path) -> bool:
    try:
        _read_verified(path)
    except CheckpointError:
        return False
    return True
