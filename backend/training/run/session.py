"""What surrounds a run while it trains: its lock, signals, checkpoints, record, MLflow, readers."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from app.ml.artifacts import LOCK_NAME, ModelRecord, SaveError
from app.ml.durable import check_writable
from training.compute.distributed import Processes, losses_explained
from training.compute.features import FeatureSource
from training.config import TrainingConfig
from training.data.manifest import write_manifest
from training.data.splits import FoodData
from training.errors import DataError, ReleaseError
from training.run.checkpointer import Checkpointer
from training.run.checkpoints import Checkpoint
from training.run.copies import check_mounted
from training.run.record import RunEnd, recording
from training.run.resume import locked, mark_finished
from training.run.signals import Interrupted
from training.run.state import Run


class Session:
    """The services of one start of a run; `open_session` opens and closes them."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        end: RunEnd,
        sources: tuple[FeatureSource, ...],
        closing: contextlib.ExitStack,
    ) -> None:
        self.checkpointer, self.end, self.record = checkpointer, end, end.record
        self._sources, self._closing = sources, closing
        self.version: int | None = None

    def end_training(self) -> bool:
        """Close the readers and let the other processes go; True in the one that releases.

        There is nothing left to save: from now on a signal ends the run at once.
        """
        processes, run = self.checkpointer.processes, self.checkpointer.run
        for source in self._sources:
            source.close()
        run.skipped = processes.merged(run.skipped)
        processes.leave()
        if processes.is_main:
            self._closing.enter_context(self.checkpointer.stop.raising())
        return processes.is_main

    def end_epoch(self, metrics: dict[str, Any]) -> None:
        """Save the run after an epoch, and record it."""
        self.checkpointer.save()
        self.record.epoch(metrics)

    def finish(self, released: ModelRecord) -> None:
        """Note the version that the run was released as."""
        self.end.finish(released)
        self.version = released.version


def check_folders(config: TrainingConfig) -> None:
    """Fail before hours of training where their result could not be written.

    Raises:
        FolderError, CheckpointError: one line that names the flag.
    """
    check_writable(config.checkpoint_dir, "--checkpoint_dir")
    if config.checkpoint_copy_dir:
        check_mounted(config.checkpoint_copy_dir)
    check_writable(config.output_dir, "--output_dir", LOCK_NAME)


@contextlib.contextmanager
def open_session(
    run: Run,
    run_dir: Path,
    data: FoodData,
    checkpoint: Checkpoint | None,
    device: torch.device,
    processes: Processes,
    sources: tuple[FeatureSource, ...],
) -> Iterator[Session]:
    """Keep a run's lock, record, checkpoints and readers while it trains, however it ends.

    Raises:
        CheckpointError: another process has the run.
        ReleaseError, SaveError: it could not be released; the first if it is saved as it is.
        OSError: its folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(losses_explained())
        if processes.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(run_dir))
            if not checkpoint:
                write_manifest(run_dir, data)
        checkpointer = Checkpointer(run, run_dir, processes, checkpoint)
        stack.enter_context(contextlib.closing(checkpointer))
        with contextlib.ExitStack() as closing:
            end = closing.enter_context(
                recording(run, run_dir, data, checkpoint, device, processes)
            )
            for source in sources:
                closing.callback(source.close)
            session = Session(checkpointer, end, sources, closing)
            try:
                yield session
            except DataError:  # the disk is gone; the training so far is sound
                checkpointer.save()
                raise
            except SaveError as error:
                if not checkpointer.is_saved:
                    raise
                raise ReleaseError(str(error)) from error
            except Interrupted as interrupted:
                interrupted.can_resume = checkpointer.last_good is not None
                raise
        if session.version:  # only now that the record has its end too
            mark_finished(run_dir, run, session.version)
