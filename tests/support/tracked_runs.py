"""Records of runs, and what MLflow holds of them, for the tests of both."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.run.history import read_events
from training.run.mlflow_sync import sync
from training.run.record import RunRecord

FIVE = ("train_loss", "train_acc", "val_loss", "val_acc", "learning_rate")


def epoch_metrics(epoch: int, **more: float) -> dict[str, Any]:
    values = {name: epoch / 10 + i for i, name in enumerate(FIVE)}
    return {"epoch": epoch, **values, "images_per_second": 50.0, **more}


def started(run_dir: Path, uri: str, **more: Any) -> RunRecord:
    run_dir.mkdir(parents=True, exist_ok=True)
    record = RunRecord(run_dir)
    facts: dict[str, Any] = {"params": {"epochs": 3, "data": Path("data")}, "system": {"cpus": 2}}
    record.start(run_name=run_dir.name, experiment="tests", tracking_uri=uri, **(facts | more))
    return record


def ended(record: RunRecord, **more: Any) -> None:
    facts: dict[str, Any] = {"metrics": {"test_top1": 0.8, "training_seconds": 12.5}}
    facts |= {"status": "FINISHED", "files": [], "model": None}
    record.end(**(facts | more))


def finished_run(run_dir: Path, uri: str, *, files: dict[str, str] | None = None) -> None:
    """The record of a run of one epoch that released a model of these files."""
    record = started(run_dir, uri)
    record.epoch(epoch_metrics(1))
    paths = [run_dir / name for name in files or {}]
    for path, text in zip(paths, (files or {}).values(), strict=True):
        path.write_text(text)
    model = {"name": "nutrilearn-food", "version": 7, "files": paths} if paths else None
    ended(record, files=paths, model=model)


def bring_in_sync(run_dir: Path, tracking_uri: str | None = None) -> str:
    result = sync(run_dir, deadline_seconds=60, tracking_uri=tracking_uri)
    assert result.in_sync, result.message
    return result.message


def the_run(uri: str, run_dir: Path) -> Any:
    """The one run in MLflow of this folder."""
    from mlflow import MlflowClient

    client = MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name("tests")
    key = read_events(run_dir / "metrics.jsonl")[0]["run"]
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`nutrilearn.run` = '{key}'")
    return run


def histories(uri: str, run: Any) -> dict[str, list[tuple[int, float]]]:
    """The five metrics as lists of (step, value)."""
    from mlflow import MlflowClient

    client = MlflowClient(uri, uri)
    points = {name: client.get_metric_history(run.info.run_id, name) for name in FIVE}
    return {name: sorted((p.step, p.value) for p in found) for name, found in points.items()}


def epochs_in(run_dir: Path) -> list[int]:
    return [e["epoch"] for e in read_events(run_dir / "metrics.jsonl") if e["event"] == "epoch"]


def assert_in_sync(uri: str, run_dir: Path, epochs: int, status: str = "FINISHED") -> None:
    run = the_run(uri, run_dir)
    assert run.info.status == status
    steps = range(1, epochs + 1)
    wanted = {name: [(epoch, epoch / 10 + i) for epoch in steps] for i, name in enumerate(FIVE)}
    assert histories(uri, run) == wanted


def eventually(check: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)
