"""When a run is saved, how it is stopped by a signal, and which checkpoint it goes on from."""

import contextlib
import dataclasses
import json
import logging
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from app.ml.artifacts import write_durably
from training.compute.distributed import Processes
from training.config import TrainingConfig, differences
from training.data.splits import FoodData, Split
from training.errors import CheckpointError
from training.run.checkpoints import (
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    run_folders,
    save_checkpoint,
)
from training.run.state import Run, file_sha256, fingerprint, unpack_data

CHECKPOINT_SECONDS = 300  # at most this much work is lost to a power cut inside an epoch
FINISHED_NAME = "finished.json"
LOCK_NAME = ".in-use.lock"
ORPHAN_SECONDS = 15  # a killed trainer's data workers hold its lock until they notice, for 5 s

logger = logging.getLogger(__name__)


class Interrupted(BaseException):
    """A signal asked the run to end, and its checkpoint is written.

    Like KeyboardInterrupt no Exception: a decoder that takes whatever goes wrong for a damaged
    image must not swallow it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class StopRequest:
    """Remembers the first SIGINT or SIGTERM; a second one ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        self._raises = False
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, _frame: object) -> None:
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.number = number
        if self._raises:
            raise Interrupted(number)

    def raise_from_now(self) -> None:
        """Nothing is left to save: raise Interrupted at once if a signal came or when one comes."""
        self._raises = True
        if self.number:
            raise Interrupted(self.number)

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Keeper:
    """Writes the checkpoints of a run: when asked, when it is time, when a signal came.

    Until it is closed, no other process can take the run up.
    """

    def __init__(
        self, run: Run, run_dir: Path, processes: Processes, checkpoint: Checkpoint | None
    ) -> None:
        """Raises: OSError, where the folder cannot be made or written; CheckpointError, where
        another process has the run."""
        self.run, self.run_dir, self.processes = run, run_dir, processes
        self.last_good = checkpoint.path if checkpoint else None
        self._saved_at = time.monotonic()
        self._lock: FileLock | None = None
        if processes.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._lock = lock_run(run_dir)
        self.stop = StopRequest()

    def close(self) -> None:
        """Give the signals back to whom they belonged, and the run to other processes."""
        self.stop.close()
        if self._lock:
            self._lock.release()

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

    def check(self) -> None:
        """After each batch: save when it is time.

        Raises:
            Interrupted: a signal came, here or to another process; the checkpoint is written.
        """
        if number := self.processes.highest(self.stop.number):
            self.save()
            raise Interrupted(int(number))
        if time.monotonic() - self._saved_at > CHECKPOINT_SECONDS:
            self.save()


def find_checkpoint(config: TrainingConfig, data: FoodData) -> Checkpoint | None:
    """What --resume asks for: None to start afresh.

    Raises:
        CheckpointError: the checkpoint named cannot be used.
    """
    if config.resume is None:
        return None

    def unusable(state: dict[str, Any]) -> str | None:
        differing = list(differences(config.exact_settings(), _settings_of_run(state, config)))
        if not differing and state["data_fingerprint"] != fingerprint(data):
            differing = _new_in(data, unpack_data(state["packed_data"]))
        return f"it belongs to another run: {'; '.join(differing)}" if differing else None

    if config.resume == "auto":
        checkpoint = newest_checkpoint(_unfinished(config), unusable)
        if checkpoint is None:
            logger.info("nothing to resume in %s; a new run starts", config.checkpoint_dir)
        return checkpoint
    try:
        path = Path(config.resume).expanduser()
    except RuntimeError as error:  # ~nobody has no home
        raise CheckpointError(f"--resume {config.resume}: {error}") from error
    _check_free(path if path.is_dir() else path.parent)
    if path.is_dir():
        checkpoint = newest_checkpoint([path], unusable)
        if checkpoint is None:
            raise CheckpointError(f"--resume {path}: no checkpoint in this folder can be used")
        return checkpoint
    checkpoint = load_checkpoint(path)
    if reason := unusable(checkpoint.state):
        raise CheckpointError(f"--resume {path}: {reason}")
    return checkpoint


def _settings_of_run(state: dict[str, Any], config: TrainingConfig) -> dict[str, Any]:
    """The settings of a checkpoint, in the words of today's where those mean the same."""
    then = {"augmentation": "basic", **state["config"]}  # runs from before the flag had no other
    if config.precision == state["precision"]:  # spelt out now, auto then
        then["precision"] = config.precision
    path = Path(config.weights)
    if sha256 := file_sha256(path):
        is_same = sha256 == state["weights_sha256"]
    else:  # a word, or a file that is gone: the checkpoint holds all that came from it
        is_same = path.name == Path(then["weights"]).name
    if is_same:
        then["weights"] = config.weights
    elif then["weights"] == config.weights:
        then["weights"] += " with other content"
    return then


def _unfinished(config: TrainingConfig) -> Iterator[Path]:
    """The folders of the runs that can go on, the one written to last first."""
    for run_dir in run_folders(config.checkpoint_dir):
        if _is_finished(run_dir, config):
            continue
        try:
            _check_free(run_dir)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
            continue
        yield run_dir


def _is_finished(run_dir: Path, config: TrainingConfig) -> bool:
    """Released, and neither more epochs nor more patience would let it go on."""
    path = run_dir / FINISHED_NAME
    try:
        finished = json.loads(path.read_text(encoding="utf-8"))
        waited = finished["epochs_without_lower_loss"]
        done = finished["epochs"] >= config.epochs
        return bool(done or waited >= config.early_stopping_patience)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read (%s); its run counts as not finished", path, error)
        return False


def lock_run(run_dir: Path) -> FileLock:
    """Keep other processes from a run until the lock is released or this process ends.

    Raises:
        CheckpointError: another process has it, or the disk cannot lock files.
    """
    lock = FileLock(run_dir / LOCK_NAME)
    try:
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            return lock
        logger.info("%s is in use; waiting up to %g s for it", run_dir, ORPHAN_SECONDS)
        lock.acquire(timeout=ORPHAN_SECONDS)
    except Timeout as error:
        raise CheckpointError(
            f"{run_dir}: another process is training this run; let it end first"
        ) from error
    except NotImplementedError as error:
        raise CheckpointError(
            f"{run_dir}: its disk cannot lock files; take another one for --checkpoint_dir"
        ) from error
    return lock


def _check_free(run_dir: Path) -> None:
    if (run_dir / LOCK_NAME).exists():
        lock_run(run_dir).release()


def _new_in(data: FoodData, then: FoodData) -> list[str]:
    """Why a run that began with other lists of images cannot go on with what is there now.

    Images that are gone are no reason: they are left out, as they are when they go while it trains.
    """
    if data.class_to_idx != then.class_to_idx:
        changed = sorted(data.class_to_idx.keys() ^ then.class_to_idx.keys())
        return [f"the classes are not the same ({', '.join(changed)})"]
    # Of all parts together: where the data has no test part, one image less shifts the parts.
    known = {_place(path) for split in _splits(then) for path in split.paths}
    new = [p for split in _splits(data) for p in split.paths if _place(p) not in known]
    return [f"{len(new)} images are new, {new[0]} for one"] if new else []


def data_of_run(checkpoint: Checkpoint, data: FoodData) -> FoodData:
    """The images that a run began with, where they are now; those that are gone keep their path,
    so that they are named and left out."""
    if checkpoint.state["data_fingerprint"] == fingerprint(data):
        return data
    then = unpack_data(checkpoint.state["packed_data"])
    anywhere = {_place(path): path for split in _splits(data) for path in split.paths}
    count = Counter(_place(path) for split in _splits(then) for path in split.paths)
    unique = {place: path for place, path in anywhere.items() if count[place] == 1}
    pairs = zip(_splits(then), _splits(data), strict=True)
    train, val, test = (_where_now(before, now, unique) for before, now in pairs)
    return dataclasses.replace(then, train=train, val=val, test=test)


def _where_now(before: Split, now: Split, unique: dict[tuple[str, str], str]) -> Split:
    """unique: images of any part whose class and name only one image had."""
    places = {**unique, **{_place(path): path for path in now.paths}}
    paths = (p if Path(p).exists() else places.get(_place(p), p) for p in before.paths)
    return Split(tuple(paths), before.labels)


def _splits(data: FoodData) -> tuple[Split, Split, Split]:
    return data.train, data.val, data.test


def _place(path: str) -> tuple[str, str]:
    """An image's class folder and name: the data folder may have moved."""
    return Path(path).parent.name, Path(path).name


def mark_finished(run_dir: Path, run: Run, version: int) -> None:
    """Note that there is nothing left to resume."""
    facts = {
        "version": version,
        "epochs": run.progress.epoch,
        "epochs_without_lower_loss": run.verdict.epochs_without_lower_loss,
    }
    write_durably(run_dir / FINISHED_NAME, json.dumps(facts).encode())
