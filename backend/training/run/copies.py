"""Copies of checkpoints in a second folder, such as a mounted Google Drive.

A mounted Drive may lose or truncate what is written to it: a copy gets a new name, is read back and
compared by SHA-256, and only then are older ones removed; two of each run are kept. Nothing that
happens to the copies can stop a run.
"""

import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from app.ml.durable import NOT_IMPLEMENTED, optional
from training.data.manifest import MANIFEST_NAME
from training.errors import CheckpointError
from training.run.checkpoints import KEEP, load_checkpoint, newest_checkpoint, run_folders

FINAL_TRIES = 3

logger = logging.getLogger(__name__)


class CheckpointCopies:
    """The copies in `copy_dir` of what is in `checkpoint_dir`, in folders of the same names."""

    def __init__(self, checkpoint_dir: Path, copy_dir: Path) -> None:
        self.checkpoint_dir, self.copy_dir = checkpoint_dir, copy_dir
        self._verified: set[Path] = set()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-copies")
        self._job: Future[bool] | None = None
        self._newest: Path | None = None

    def restore(self) -> None:
        """Bring back the newest copy that verifies of each run that has no checkpoint here.

        Raises:
            CheckpointError: the copies cannot be reached, or this disk cannot be written.
        """
        check_mounted(self.copy_dir)
        for copied_run in reversed(run_folders(self.copy_dir)):  # the newest here comes last too
            run_dir = self.checkpoint_dir / copied_run.name
            if any(run_dir.glob("checkpoint-*.json")):
                continue
            if checkpoint := newest_checkpoint([copied_run], lambda _run_dir, _state: None):
                try:
                    copy_checkpoint(checkpoint.path, run_dir)
                except OSError as error:
                    raise CheckpointError(f"{run_dir} cannot be restored: {error}") from error
                logger.info("restored %s from %s", run_dir / checkpoint.path.name, copied_run)

    def start_copying(self, path: Path) -> None:
        """Copy a checkpoint in the background; while a copy is under way, the newest waits."""
        self._newest = path
        if self._job is None or self._job.done():
            self._job = self._pool.submit(self.copy, path)

    def close(self) -> None:
        """Wait until the newest checkpoint is copied, or say that it is not."""
        self._pool.shutdown(wait=True)
        if self._newest is None or self._target(self._newest) in self._verified:
            return
        newest = self._newest
        if not any(self.copy(newest) for _ in range(FINAL_TRIES)):
            logger.warning("the newest checkpoint is only in %s", newest.parent)

    def copy(self, path: Path) -> bool:
        """Copy a checkpoint and drop older copies; False, with a line, if it could not be done."""
        try:
            self._copy(path)
        except (OSError, CheckpointError) as error:
            logger.warning("%s could not be copied to %s yet: %s", path.name, self.copy_dir, error)
            return False
        return True

    def _target(self, path: Path) -> Path:
        return self.copy_dir / path.parent.name / path.name

    def _copy(self, path: Path) -> None:
        target = self._target(path)
        if not self._verifies(target):
            copy_checkpoint(path, target.parent)
            self._verified.add(target)
        others = sorted(set(target.parent.glob("checkpoint-*.pt")) - {target}, reverse=True)
        kept = [other for other in others if self._verifies(other)][: KEEP - 1]
        for other in others:
            if other not in kept:
                _remove(other)

    def _verifies(self, path: Path) -> bool:
        if path not in self._verified:
            try:
                load_checkpoint(path)
            except CheckpointError:
                return False
            self._verified.add(path)
        return True


def check_mounted(copy_dir: Path) -> None:
    """Tell a drive that is not mounted before its folder is made on this disk.

    Raises:
        CheckpointError: the folder that should hold the copies is not there, or is a file.
    """
    if not copy_dir.parent.is_dir():
        raise CheckpointError(
            f"--checkpoint_copy_dir {copy_dir}: there is no {copy_dir.parent}; is the drive "
            "mounted?"
        )
    if copy_dir.exists() and not copy_dir.is_dir():
        raise CheckpointError(f"--checkpoint_copy_dir {copy_dir} is a file; give a folder")


def copy_checkpoint(path: Path, folder: Path) -> None:
    """Copy a checkpoint, its checksum and its run's list of images, and read the copy back.

    Raises:
        CheckpointError: what arrived is not what was sent; nothing of it is left.
        OSError: one of the two places cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / path.name
    _remove(target)  # half a copy, of a process that was killed
    try:
        if path.with_name(MANIFEST_NAME).exists():
            _copy_manifest(path.with_name(MANIFEST_NAME), folder / MANIFEST_NAME)
        for suffix in (".pt", ".json"):
            write_new(target.with_suffix(suffix), path.with_suffix(suffix).read_bytes())
        load_checkpoint(target)
    except (OSError, CheckpointError):
        _remove(target)
        raise


def _copy_manifest(source: Path, target: Path) -> None:
    data = source.read_bytes()
    if target.exists() and target.read_bytes() == data:
        return
    target.unlink(missing_ok=True)
    write_new(target, data)
    if target.read_bytes() != data:
        raise CheckpointError(f"{target} is not what was written")


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is not there yet, down to the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        with optional("fsync of files", NOT_IMPLEMENTED):
            os.fsync(file.fileno())


def _remove(checkpoint: Path) -> None:
    for suffix in (".json", ".pt"):
        checkpoint.with_suffix(suffix).unlink(missing_ok=True)
