"""The record of a run: `metrics.jsonl` in its folder, and what keeps it while the run lasts.

The record is one JSON object a line, appended and synced to disk, times in milliseconds since
1970. MLflow is its mirror (see `mlflow_mirror`): nothing it does can stop, slow or break a run.
"""

import contextlib
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from app.ml.artifacts import ModelRecord, released_files
from app.ml.durable import NOT_IMPLEMENTED, optional
from training.compute.devices import system_facts
from training.compute.distributed import Processes
from training.config import REPOSITORY, TrainingConfig
from training.data.manifest import describe, fingerprint, write_manifest
from training.data.splits import FoodData
from training.run.checkpoints import Checkpoint
from training.run.git import git_facts
from training.run.history import NOT_METRICS, RECORD_NAME, read_events
from training.run.mlflow_mirror import MlflowMirror
from training.run.mlflow_registry import REGISTERED_NAME
from training.run.signals import Interrupted
from training.run.state import Run
from training.uris import absolute_uri, without_password

logger = logging.getLogger(__name__)


class RunRecord:
    """Appends to `metrics.jsonl`; `RunRecord(None)` keeps nothing (ranks above 0).

    A disk that cannot be written does not stop the run: lines are buffered in memory for the next
    write, and after a crash `resumed` completes them from the checkpoint.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self._path = run_dir / RECORD_NAME if run_dir else None
        self._unwritten: list[bytes] = []
        self._failing = False
        self._length: int | None = None  # bytes of whole lines in the file
        self._repair = False
        events = self._read()
        self._epochs = {event["epoch"] for event in events if event["event"] == "epoch"}
        self._key = next((e["run"] for e in events if e["event"] == "start"), uuid.uuid4().hex)
        self._last_time = max((event["time"] for event in events), default=0)

    def _read(self) -> list[dict[str, Any]]:
        try:
            return read_events(self._path) if self._path else []
        except OSError as error:
            logger.warning("cannot read %s (%s); appending to it", self._path, error)
            return []

    def start(
        self,
        *,
        run_name: str,
        experiment: str,
        tracking_uri: str,
        params: dict[str, object],
        system: dict[str, object],
        data: dict[str, object] | None = None,
    ) -> None:
        """Note one start of the trainer; a resumed run has several. Passwords are left out."""
        self._append(
            "start",
            run=self._key,
            run_name=run_name,
            run_dir=str(self._path.resolve().parent) if self._path else None,
            experiment=experiment,
            tracking_uri=without_password(absolute_uri(tracking_uri)),
            params=_plain(params),
            system=_plain(system),
            data=_plain(data or {}),
        )

    def resumed(self, *, epoch: int, batch: int, history: list[dict[str, Any]]) -> None:
        """Note where the run continues; append the epochs of `history` that the file lacks."""
        self._append("resumed", epoch=epoch, batch=batch)
        for metrics in history:
            self.epoch(metrics)

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Append one epoch (`epoch` counts from 1); one that is there already stays as it is."""
        number = int(metrics["epoch"])
        if number not in self._epochs:
            self._epochs.add(number)
            numbers = {k: float(v) for k, v in metrics.items() if k not in NOT_METRICS}
            self._append("epoch", epoch=number, **_plain(numbers))

    def end(
        self,
        *,
        status: str,
        metrics: dict[str, float],
        files: list[Path],
        model: dict[str, Any] | None,
    ) -> None:
        """Note the end.

        `status` is FINISHED, FAILED or KILLED; `metrics` have names that no epoch uses; `model` is
        {"name", "version", "files"}. Files are written relative to the run's folder.
        """
        if model:
            model = {**model, "files": [self._relative(file) for file in model["files"]]}
        self._append(
            "end",
            status=status,
            metrics=_plain({key: float(value) for key, value in metrics.items()}),
            files=[self._relative(file) for file in files],
            model=model,
        )

    def _relative(self, file: Path) -> str:
        """The path from the run's folder: the whole project may move."""
        try:
            return os.path.relpath(file, self._path.parent) if self._path else str(file)
        except ValueError:  # another drive of Windows
            return str(file.absolute())

    def _append(self, event: str, **facts: object) -> None:
        if self._path is None:
            return
        self._last_time = max(self._last_time, int(time.time() * 1000))  # clocks may run back
        line = json.dumps({"event": event, "time": self._last_time, **facts})
        self._unwritten.append(line.encode() + b"\n")
        try:
            self._write(self._path, b"".join(self._unwritten))
        except OSError as error:
            self._warn(error, event)
            return
        if self._failing:
            logger.warning("%s is writable again; no line was lost", self._path)
        self._failing = False
        self._unwritten.clear()

    def _warn(self, error: OSError, event: str) -> None:
        lines = len(self._unwritten)
        if event == "end":
            logger.warning(
                "cannot write %s (%s); its last %d lines are lost", self._path, error, lines
            )
        elif not self._failing:
            logger.warning("cannot write %s (%s); buffering its lines in memory", self._path, error)
        self._failing = True

    def _write(self, path: Path, lines: bytes) -> None:
        if self._length is None:  # a crash may have left half a line
            self._length = (path.read_bytes() if path.exists() else b"").rfind(b"\n") + 1
            self._repair = True
        if self._repair and path.exists():
            os.truncate(path, self._length)
        self._repair = True  # until the lines are on the disk, part of them may be
        with path.open("ab") as file:
            file.write(lines)
            file.flush()
            with optional("fsync of files", NOT_IMPLEMENTED):
                os.fsync(file.fileno())
        self._length += len(lines)
        self._repair = False


def _plain(facts: Mapping[str, object]) -> dict[str, object]:
    """Values that every JSON reader knows; the others (paths, lists, nan) as their text."""
    return {key: _plain_value(value) for key, value in facts.items()}


def _plain_value(value: object) -> object:
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return without_password(str(value))


# The context around a run ---------------------------------------------------------------------


@dataclass
class RunEnd:
    """How a run ended, for its record; FAILED until something better is known."""

    record: RunRecord
    config: TrainingConfig
    history: list[dict[str, float]]
    status: str = "FAILED"
    metrics: dict[str, float] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    model: dict[str, Any] | None = None

    def finish(self, released: ModelRecord) -> None:
        """Note the version that the run was released as."""
        numbers = {k: v for k, v in released.metrics.items() if isinstance(v, (int, float))}
        self.status, self.metrics = "FINISHED", numbers
        self.metrics["training_seconds"] = sum(epoch["seconds"] for epoch in self.history)
        self.files = released_files(self.config.output_dir, released)
        self.model = {"name": REGISTERED_NAME, "version": released.version, "files": self.files}


@contextlib.contextmanager
def recording(
    run: Run,
    run_dir: Path,
    data: FoodData,
    checkpoint: Checkpoint | None,
    device: torch.device,
    processes: Processes,
) -> Iterator[RunEnd]:
    """Keep metrics.jsonl and its MLflow mirror while the run lasts, however it ends."""
    config, progress = run.config, run.progress
    record = RunRecord(run_dir if processes.is_main else None)
    _note_start(record, run.name, config, describe(data, run.data_fingerprint, config), device)
    if checkpoint:
        at = (progress.epoch, progress.batch)
        logger.info("resumed after epoch %d, batch %d: %s", *at, checkpoint.path)
        record.resumed(epoch=progress.epoch, batch=progress.batch, history=progress.history)
    with _mirrored(record, run_dir, config, progress.history, processes.is_main) as end:
        yield end


@contextlib.contextmanager
def recording_mean(
    name: str, config: TrainingConfig, data: FoodData, device: torch.device
) -> Iterator[RunEnd]:
    """Keep the record of a mean of versions, a run without epochs, as `recording` keeps others."""
    run_dir = config.checkpoint_dir / name
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_manifest(run_dir, data)
    except OSError as error:
        logger.warning("the lists of images cannot be saved in %s (%s)", run_dir, error)
    record = RunRecord(run_dir)
    _note_start(record, name, config, describe(data, fingerprint(data), config), device)
    with _mirrored(record, run_dir, config, history=[], is_main=True) as end:
        yield end


def _note_start(
    record: RunRecord,
    name: str,
    config: TrainingConfig,
    data: dict[str, object],
    device: torch.device,
) -> None:
    system = system_facts(device, config.precision) | git_facts(REPOSITORY)
    logger.info("run %s on %s, %s", name, system["device"], system["precision"])
    record.start(
        run_name=name,
        experiment=config.experiment_name,
        tracking_uri=config.tracking_uri,
        params=config.to_dict(),
        system=system,
        data=data,
    )


@contextlib.contextmanager
def _mirrored(
    record: RunRecord,
    run_dir: Path,
    config: TrainingConfig,
    history: list[dict[str, float]],
    is_main: bool,
) -> Iterator[RunEnd]:
    """Let MLflow follow the record until the end, which is noted however it comes."""
    mirrored = is_main and not config.no_mlflow
    mirror = MlflowMirror.launch(run_dir, config.tracking_uri) if mirrored else MlflowMirror()
    end = RunEnd(record, config, history)
    try:
        yield end
    except Interrupted:
        end.status = "KILLED"
        raise
    finally:
        record.end(status=end.status, metrics=end.metrics, files=end.files, model=end.model)
        if line := mirror.close():
            logger.info("%s", line)
