"""Keeps the record of a run, and its MLflow mirror, for as long as the run goes on."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from app.ml.artifacts import ModelRecord, released_files
from training.compute.devices import system_facts
from training.compute.distributed import Processes
from training.config import TrainingConfig
from training.run.checkpoints import Checkpoint
from training.run.record import MlflowMirror, RunRecord
from training.run.signals import Interrupted
from training.run.state import Run

REGISTERED_NAME = "nutrilearn-food"  # the model's name in MLflow's registry

logger = logging.getLogger(__name__)


@dataclass
class Ending:
    """How a run ended, for its record; FAILED until something better is known."""

    record: RunRecord
    config: TrainingConfig
    history: list[dict[str, float]]
    status: str = "FAILED"
    metrics: dict[str, float] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    model: dict[str, Any] | None = None

    def finish(self, released: ModelRecord) -> None:
        numbers = {k: v for k, v in released.metrics.items() if isinstance(v, (int, float))}
        self.status, self.metrics = "FINISHED", numbers
        self.metrics["training_seconds"] = sum(epoch["seconds"] for epoch in self.history)
        self.files = [str(path) for path in released_files(self.config.output_dir, released)]
        self.model = {"name": REGISTERED_NAME, "version": released.version, "files": self.files}


@contextlib.contextmanager
def recorded(
    run: Run,
    run_dir: Path,
    checkpoint: Checkpoint | None,
    device: torch.device,
    processes: Processes,
) -> Iterator[Ending]:
    """Keep metrics.jsonl and its MLflow mirror while the run goes on, however it ends."""
    config = run.config
    mirrored = processes.is_main and not config.no_mlflow
    record = RunRecord(run_dir if processes.is_main else None)
    system = system_facts(device, config.precision)
    logger.info("run %s on %s, %s", run.name, system["device"], system["precision"])
    record.start(
        run_name=run.name,
        experiment=config.experiment_name,
        tracking_uri=config.tracking_uri,
        params=config.to_dict(),
        system=system,
    )
    if checkpoint:
        at = run.progress
        logger.info("resumed after epoch %d, batch %d: %s", at.epoch, at.batch, checkpoint.path)
        record.resumed(epoch=at.epoch, batch=at.batch, history=at.history)
    mirror = MlflowMirror.launch(run_dir) if mirrored else MlflowMirror()
    ending = Ending(record, config, run.progress.history)
    try:
        yield ending
    except Interrupted:
        ending.status = "KILLED"
        raise
    finally:
        record.end(
            status=ending.status, metrics=ending.metrics, files=ending.files, model=ending.model
        )
        if line := mirror.close():
            logger.info("%s", line)
