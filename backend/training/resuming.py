"""When a run is saved, how it is stopped by a signal, and which checkpoint it goes on from."""

import json
import logging
import signal
import time
from pathlib import Path
from typing import Any

from app.ml.artifacts import write_durably
from training.checkpoints import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    run_folders,
    save_checkpoint,
)
from training.config import TrainingConfig, differences
from training.distributed import Processes
from training.run_state import Run

CHECKPOINT_SECONDS = 300  # at most this much work is lost to a power cut inside an epoch
FINISHED_NAME = "finished.json"

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """A signal asked the run to end, and its checkpoint is written."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class StopRequest:
    """Remembers the first SIGINT or SIGTERM; a second one ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.number = number


class Keeper:
    """Writes the checkpoints of a run: when asked, when it is time, when a signal came."""

    def __init__(
        self, run: Run, run_dir: Path, processes: Processes, checkpoint: Checkpoint | None
    ) -> None:
        self.run, self.run_dir, self.processes = run, run_dir, processes
        self.stop = StopRequest()
        self.last_good = checkpoint.path if checkpoint else None
        self._saved_at = time.monotonic()

    def save(self) -> None:
        """Write one; a full disk is said and survived, as the checkpoint before it is whole."""
        self._saved_at = time.monotonic()
        if not self.processes.is_main:
            return
        try:
            self.last_good = save_checkpoint(self.run_dir, self.run.state())
        except OSError as error:
            logger.error(
                "no checkpoint could be written (%s); training goes on, and %s",
                error,
                f"the last good one is {self.last_good}" if self.last_good else "there is none yet",
            )

    def check(self, stop_number: float) -> None:
        """After each batch: save when it is time.

        Raises:
            Interrupted: a signal came; the checkpoint is written.
        """
        if stop_number:
            self.save()
            raise Interrupted(int(stop_number))
        if time.monotonic() - self._saved_at > CHECKPOINT_SECONDS:
            self.save()


def find_checkpoint(run: Run) -> Checkpoint | None:
    """What --resume asks for: None to start afresh.

    Raises:
        CheckpointError: the checkpoint named cannot be used.
    """
    config = run.config
    if config.resume is None:
        return None

    def unusable(state: dict[str, Any]) -> str | None:
        differing = list(differences(config.exact_settings(), state["config"]))
        if state["data_fingerprint"] != run.data_fingerprint:
            differing.append("the list of images is not the same")
        return f"it belongs to another run: {'; '.join(differing)}" if differing else None

    if config.resume == "auto":
        folders = [p for p in run_folders(config.checkpoint_dir) if not _is_finished(p, config)]
        checkpoint = newest_checkpoint(folders, unusable)
        if checkpoint is None:
            logger.info("nothing to resume in %s; a new run starts", config.checkpoint_dir)
        return checkpoint
    path = Path(config.resume).expanduser()
    if path.is_dir():
        checkpoint = newest_checkpoint([path], unusable)
        if checkpoint is None:
            raise CheckpointError(f"--resume {path}: no checkpoint in this folder can be used")
        return checkpoint
    checkpoint = load_checkpoint(path)
    if reason := unusable(checkpoint.state):
        raise CheckpointError(f"--resume {path}: {reason}")
    return checkpoint


def _is_finished(run_dir: Path, config: TrainingConfig) -> bool:
    """Released, and not asked to train for longer."""
    try:
        finished = json.loads((run_dir / FINISHED_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    return bool(finished["stopped_early"] or finished["epochs"] >= config.epochs)


def mark_finished(run_dir: Path, run: Run, version: int) -> None:
    """Note that there is nothing left to resume."""
    facts = {
        "version": version,
        "epochs": run.progress.epoch,
        "stopped_early": run.verdict.should_stop,
    }
    write_durably(run_dir / FINISHED_NAME, json.dumps(facts).encode())
