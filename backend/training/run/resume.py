"""Which checkpoint a run continues from, and the lock that keeps other processes from it."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import Timeout

from app.ml.artifacts import list_versions
from app.ml.durable import FolderError, file_lock, write_durably
from app.ml.model import imagenet_sizes_of
from training.config import TrainingConfig, differences
from training.data.labels import digest, read_labels
from training.data.manifest import (
    data_of_run,
    fingerprint,
    labels_of,
    read_manifest,
    what_is_new,
)
from training.data.splits import FoodData
from training.errors import CheckpointError
from training.run.checkpoints import Checkpoint, load_checkpoint, newest_checkpoint, run_folders
from training.run.copies import CheckpointCopies
from training.run.start import start_file
from training.run.state import Run, file_sha256

FINISHED_NAME = "finished.json"
LOCK_NAME = ".in-use.lock"
ORPHAN_SECONDS = 15  # a killed trainer's workers hold its lock until they notice, for 5 s

logger = logging.getLogger(__name__)


def find_checkpoint(config: TrainingConfig, data: FoodData) -> tuple[Checkpoint | None, FoodData]:
    """Find what --resume asks for, and the images that belong to it.

    Returns None and the data as it is to start a new run.

    Raises:
        CheckpointError: the checkpoint named cannot be used.
    """
    if config.resume is None:
        return None, data
    if config.checkpoint_copy_dir:
        CheckpointCopies(config.checkpoint_dir, config.checkpoint_copy_dir).restore()
    checkpoint = _newest(config, data) if config.resume == "auto" else _named(config, data)
    if checkpoint is None:
        return None, data
    run_dir, expected = checkpoint.path.parent, checkpoint.state["data_fingerprint"]
    return checkpoint, data_of_run(run_dir, expected, data)


def _newest(config: TrainingConfig, data: FoodData) -> Checkpoint | None:
    checkpoint = newest_checkpoint(
        _unfinished(config), lambda run_dir, state: _why_not(run_dir, state, config, data)
    )
    if checkpoint is None:
        logger.info("nothing to resume in %s; starting a new run", config.checkpoint_dir)
    return checkpoint


def _named(config: TrainingConfig, data: FoodData) -> Checkpoint:
    """The checkpoint of this path, or the newest one of this folder."""
    try:
        path = Path(str(config.resume)).expanduser()
    except RuntimeError as error:  # no such user: ~nobody
        raise CheckpointError(f"--resume {config.resume}: {error}") from error
    _check_free(path if path.is_dir() else path.parent)
    if not path.is_dir():
        checkpoint = load_checkpoint(path)
        if reason := _why_not(path.parent, checkpoint.state, config, data):
            raise CheckpointError(f"--resume {path}: {reason}")
        return checkpoint
    newest = newest_checkpoint(
        [path], lambda run_dir, state: _why_not(run_dir, state, config, data)
    )
    if newest is None:
        raise CheckpointError(f"--resume {path}: no checkpoint in this folder can be used")
    return newest


def _why_not(
    run_dir: Path, state: dict[str, Any], config: TrainingConfig, data: FoodData
) -> str | None:
    """Why a checkpoint's run is not the one that is asked for; None if it is."""
    reasons = differences(config.exact_settings(), _settings_of(state, config))
    if not reasons and state["data_fingerprint"] != fingerprint(data):
        try:
            reasons = what_is_new(data, read_manifest(run_dir))
        except CheckpointError as error:
            return str(error)
    return f"it belongs to another run: {'; '.join(reasons)}" if reasons else None


def _settings_of(state: dict[str, Any], config: TrainingConfig) -> dict[str, Any]:
    """A checkpoint's settings, spelled as today's where those mean the same.

    A run begun before a setting was added did what the default of that setting does.
    """
    settings = {**TrainingConfig().exact_settings(), **state["config"]}
    if config.precision == state["precision"]:  # "bf16" now where "auto" meant bf16 then
        settings["precision"] = config.precision
    if _same_weights(config, settings["weights"], state["weights_sha256"]):
        settings["weights"] = config.weights
    elif settings["weights"] == config.weights:
        settings["weights"] += " with other content"
    then = recipe_then(state)
    settings |= {n: "auto" if getattr(config, n) == "auto" else value for n, value in then.items()}
    return settings


def sizes_then(state: dict[str, Any]) -> dict[str, int]:
    """The picture sizes of a checkpoint's run; earlier versions trained on those of ImageNet, and
    on one size."""
    sizes = state.get("sizes") or imagenet_sizes_of(state["config"]["model_name"])
    return {"first_crop": sizes["train_crop"], **sizes}


def recipe_then(state: dict[str, Any]) -> dict[str, Any]:
    """Settings that were `auto` as the run of a checkpoint began, and mean what they did then."""
    return {**sizes_then(state), "small_epochs": state.get("small_epochs", 0)}


def _same_weights(config: TrainingConfig, then: str, sha256_then: str) -> bool:
    """Compare files by content; a word, or a file that is gone, by name: the checkpoint holds all
    that came from it."""
    sha256 = file_sha256(start_file(config))
    return sha256 == sha256_then if sha256 else Path(config.weights).name == Path(then).name


def _unfinished(config: TrainingConfig) -> Iterator[Path]:
    """The folders of the runs that can continue, the one written to last first."""
    for run_dir in run_folders(config.checkpoint_dir):
        if _is_finished(run_dir, config):
            continue
        try:
            _check_free(run_dir)
        except CheckpointError as error:
            logger.warning("skipped: %s", error)
            continue
        yield run_dir


def _is_finished(run_dir: Path, config: TrainingConfig) -> bool:
    """Released, and neither more epochs nor more patience would let it continue."""
    path = run_dir / FINISHED_NAME
    try:
        finished = json.loads(path.read_text(encoding="utf-8"))
        waited = finished["epochs_without_lower_loss"]
        done = finished["epochs"] >= config.epochs
        return bool(done or waited >= config.early_stopping_patience)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read (%s); its run counts as unfinished", path, error)
        return False


def finished_version(config: TrainingConfig) -> int | None:
    """Find the version that a finished run with these settings was released as, if it is there."""

    labels = digest(read_labels(config.labels)) if config.labels else None

    def other_settings(run_dir: Path, state: dict[str, Any]) -> str | None:
        reasons = differences(config.exact_settings(), _settings_of(state, config))
        try:
            if labels_of(read_manifest(run_dir)) != labels:
                reasons.append("the labels differ")
        except CheckpointError as error:
            reasons.append(str(error))
        return "; ".join(reasons) or None

    released = list_versions(config.output_dir)
    for run_dir in run_folders(config.checkpoint_dir):
        if _is_finished(run_dir, config) and newest_checkpoint([run_dir], other_settings):
            version = json.loads((run_dir / FINISHED_NAME).read_text(encoding="utf-8"))["version"]
            if version in released:
                return int(version)
    return None


def mark_finished(run_dir: Path, run: Run, version: int) -> None:
    """Note that there is nothing left to resume."""
    facts = {
        "version": version,
        "epochs": run.progress.epoch,
        "epochs_without_lower_loss": run.early_stopping.epochs_without_lower_loss,
    }
    try:
        write_durably(run_dir / FINISHED_NAME, json.dumps(facts).encode())
    except OSError as error:  # the model is out; all that is lost is this note
        logger.warning(
            "%s cannot be marked as finished (%s); --resume auto would release it again",
            run_dir,
            error,
        )


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep other processes from a run, until the block or this process ends.

    Raises:
        CheckpointError: another process has it, or it is another user's.
    """
    with contextlib.ExitStack() as stack:
        try:
            _take(stack, run_dir)
        except Timeout as error:
            raise CheckpointError(
                f"{run_dir}: another process is training this run; wait for it to finish"
            ) from error
        except FolderError as error:
            raise CheckpointError(f"the run in {run_dir} cannot be used: {error}") from error
        yield


def _take(stack: contextlib.ExitStack, run_dir: Path) -> None:
    try:
        stack.enter_context(file_lock(run_dir / LOCK_NAME, timeout=0))
    except Timeout:
        logger.info("%s is in use; waiting up to %g s for it", run_dir, ORPHAN_SECONDS)
        stack.enter_context(file_lock(run_dir / LOCK_NAME, timeout=ORPHAN_SECONDS))


def _check_free(run_dir: Path) -> None:
    if (run_dir / LOCK_NAME).exists():
        with locked(run_dir):
            pass
