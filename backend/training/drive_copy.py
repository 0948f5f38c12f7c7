"""Keeps copies of checkpoints in a second folder, such as a mounted Google Drive. In `backend/`:

    python -m training.drive_copy CHECKPOINT_DIR COPY_DIR -- python train_model.py --resume auto

brings back the runs whose checkpoints this disk has lost, then runs the command and copies each new
checkpoint while it trains. A mounted Drive may lose or cut what is written to it: a copy gets a new
name, is read back and compared by SHA-256, and only then older ones go; two of each run are kept.
While the command runs, nothing that happens to the copies can stop it.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from training.errors import CheckpointError
from training.run.checkpoints import KEEP, load_checkpoint, newest_checkpoint, run_folders

POLL_SECONDS = 15.0
LAST_TRIES = 3

logger = logging.getLogger("nutrilearn")


class Copies:
    """The copies in `copy_dir` of what is in `checkpoint_dir`, in folders of the same names."""

    def __init__(self, checkpoint_dir: Path, copy_dir: Path) -> None:
        self.checkpoint_dir, self.copy_dir = checkpoint_dir, copy_dir
        self._verified: set[Path] = set()

    def restore(self) -> None:
        """Bring back the newest copy that verifies of each run that has no checkpoint here.

        Raises:
            OSError: the copies cannot be reached, or this disk cannot be written.
        """
        if not self.copy_dir.parent.is_dir():
            raise FileNotFoundError(f"{self.copy_dir.parent} is not there; is the Drive mounted?")
        for copied_run in reversed(run_folders(self.copy_dir)):  # the newest here comes last too
            run_dir = self.checkpoint_dir / copied_run.name
            if any(run_dir.glob("checkpoint-*.json")):
                continue
            if checkpoint := newest_checkpoint([copied_run], lambda _state: None):
                copy_checkpoint(checkpoint.path, run_dir)
                logger.info("brought back %s from %s", run_dir / checkpoint.path.name, copied_run)

    def bring_level(self) -> bool:
        """Copy each run's newest checkpoint that is not copied yet; False if one could not be."""
        is_level = True
        for run_dir in run_folders(self.checkpoint_dir):
            complete = sorted(run_dir.glob("checkpoint-*.json"))
            if not complete:
                continue
            path = complete[-1].with_suffix(".pt")
            try:
                self._copy(path)
            except (OSError, CheckpointError) as error:
                logger.warning("%s is not copied to %s yet: %s", path.name, self.copy_dir, error)
                is_level = False
        return is_level

    def _copy(self, path: Path) -> None:
        target_dir = self.copy_dir / path.parent.name
        target = target_dir / path.name
        if target in self._verified:
            return
        if not self._verifies(target):
            _remove(target)
            copy_checkpoint(path, target_dir)
            self._verified.add(target)
        others = sorted(set(target_dir.glob("checkpoint-*.pt")) - {target}, reverse=True)
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


def copy_checkpoint(path: Path, folder: Path) -> None:
    """Copy a checkpoint and its manifest under names that are new there, and read them back.

    Raises:
        CheckpointError: what arrived is not what was sent; nothing of it is left.
        OSError: one of the two places cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / path.name
    try:
        for suffix in (".pt", ".json"):
            write_new(target.with_suffix(suffix), path.with_suffix(suffix).read_bytes())
        load_checkpoint(target)
    except (OSError, CheckpointError):
        _remove(target)
        raise


def write_new(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove(checkpoint: Path) -> None:
    for suffix in (".json", ".pt"):
        checkpoint.with_suffix(suffix).unlink(missing_ok=True)


def run_beside(command: Sequence[str], copies: Copies) -> int:
    """Run the command, copy while it runs and once more after; returns its exit code.

    A signal is passed on to the command, once, whether or not the terminal reaches it too.
    """
    process = subprocess.Popen(command, start_new_session=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: process.send_signal(received))
    while True:
        try:
            code = process.wait(timeout=POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            copies.bring_level()
    if not any(copies.bring_level() for _ in range(LAST_TRIES)):
        logger.warning("the newest checkpoint is in %s only", copies.checkpoint_dir)
    return code if code >= 0 else 128 - code


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m training.drive_copy")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint_dir", type=Path, help="where the command keeps checkpoints")
    parser.add_argument("copy_dir", type=Path, help="where the copies go, as a folder in Drive")
    parser.add_argument("command", nargs="+", help="what to run, after --")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    copies = Copies(options.checkpoint_dir, options.copy_dir)
    try:
        copies.restore()
        return run_beside(options.command, copies)
    except OSError as error:
        logger.error("%s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
