"""When a run is saved: at the end of an epoch, every few minutes, and when a signal comes."""

import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from training.compute.distributed import Processes
from training.errors import TrainingError
from training.run.checkpoints import Checkpoint, save_checkpoint
from training.run.copies import CheckpointCopies
from training.run.signals import Interrupted, StopRequest
from training.run.state import Run

CHECKPOINT_SECONDS = 300  # at most this much work is lost to a power cut inside an epoch
READ_SECONDS = 0.5  # how often a person, or the search for a loss that is not finite, needs numbers
AGREE_BATCHES = 10  # several processes agree on what to do next once in so many batches

Item = TypeVar("Item")

logger = logging.getLogger(__name__)


class Checkpointer:
    """Writes the checkpoints of a run: when asked, when it is time, when a signal came."""

    def __init__(
        self, run: Run, run_dir: Path, processes: Processes, checkpoint: Checkpoint | None
    ) -> None:
        self.run, self.run_dir, self.processes = run, run_dir, processes
        self.last_good = checkpoint.path if checkpoint else None
        self.is_saved = checkpoint is not None  # as it is now, and not as it was
        self._saved_at = self._read_at = time.monotonic()
        self._copies: CheckpointCopies | None = None
        if processes.is_main and run.config.checkpoint_copy_dir:
            self._copies = CheckpointCopies(run_dir.parent, run.config.checkpoint_copy_dir)
        self.stop = StopRequest()

    def close(self) -> None:
        """Restore the signal handlers, once the newest checkpoint is copied."""
        if self._copies:
            self._copies.close()
        self.stop.close()

    def check(self, *, is_last: bool = False) -> bool:
        """After each batch: save when it is time. True if the progress was read on the way.

        is_last: of an epoch, after which the progress is always read.

        Raises:
            Interrupted: a signal came, here or to another process; the checkpoint is written.
            TrainingError: the loss is no longer finite.
        """
        if not (is_last or self._is_due()):
            return False
        self._read_at = time.monotonic()
        is_time = self._read_at - self._saved_at > CHECKPOINT_SECONDS
        number, is_time_somewhere = self.processes.max(self.stop.number, float(is_time))
        if number or is_time_somewhere:
            self.save()
        else:
            self.read_progress()
        if number:
            raise Interrupted(int(number))
        return True

    def _is_due(self) -> bool:
        if self.processes.world_size > 1:  # all of them must come here at the same batch
            return self.run.progress.batch % AGREE_BATCHES == 0
        is_late = time.monotonic() - self._read_at > READ_SECONDS
        return is_late or bool(self.stop.number)

    def waiting_for(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Iterate, with signals obeyed at once while the next batch is waited for.

        Between two steps the run is whole, so it can be saved even where the next batch never
        comes. Several processes must agree first, in `check`.
        """
        iterator = iter(batches)
        while True:
            try:
                if self.processes.world_size > 1:
                    batch = next(iterator, None)
                else:
                    with self.stop.raising():
                        batch = next(iterator, None)
            except Interrupted:
                self.save()
                raise
            if batch is None:
                return
            yield batch

    def read_progress(self) -> None:
        """Bring the sums of the latest steps from the device; all processes do it together.

        Raises:
            TrainingError: the loss is no longer finite.
        """
        if batch := self.run.progress.read(self.processes.sum):
            raise self.not_finite(f"batch {batch}")

    def not_finite(self, where: str) -> TrainingError:
        """Build the error for a loss that is not finite."""
        return TrainingError(
            f"the loss is no longer finite at epoch {self.run.progress.epoch + 1}, {where}, "
            f"learning rate {self.run.learning_rate:g}; try a lower --learning_rate or --precision "
            f"fp32. The last good checkpoint: {self.last_good or 'none yet'}"
        )

    def save(self) -> None:
        """Write a checkpoint; a full disk is reported, not fatal, as the one before is whole.

        Raises:
            TrainingError: the loss is no longer finite, so there is nothing to save.
        """
        self.read_progress()
        self._saved_at = time.monotonic()
        if not self.processes.is_main:
            return
        self.is_saved = False
        try:
            self.last_good = save_checkpoint(self.run_dir, self.run.state())
        except OSError as error:
            last = f"the last good one is {self.last_good}" if self.last_good else "there is none"
            logger.error("no checkpoint could be written (%s); training continues, %s", error, last)
            return
        self.is_saved = True
        if self._copies:
            self._copies.start_copying(self.last_good)
