"""The record of a run: nothing lost, nothing twice, no password in it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.support.tracked_runs import ended, epoch_metrics, epochs_in, started

from training.config import REPOSITORY
from training.run.history import RunHistory, read_events
from training.run.mlflow_mirror import MlflowMirror
from training.run.record import RunRecord

URI = "sqlite:///mlflow.db"


def test_the_record_holds_the_whole_run_line_by_line(tmp_path: Path) -> None:
    record = started(tmp_path, URI)
    record.epoch(epoch_metrics(1, val_loss=float("nan")))
    ended(record, model={"name": "food", "version": 1, "files": [tmp_path / "a.pth"]})
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "epoch", "end"]
    assert events[0]["tracking_uri"] == f"sqlite:///{Path('mlflow.db').absolute()}"
    assert events[0]["run_dir"] == str(tmp_path)
    assert events[0]["params"] == {"epochs": 3, "data": "data"}
    assert events[1]["val_loss"] == "nan", "NaN is not JSON"
    assert events[2]["model"]["files"] == ["a.pth"]


def test_files_are_found_from_the_folder_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to the current folder when they are noted, and wherever the project moves."""
    monkeypatch.chdir(tmp_path)
    record = started(tmp_path / "runs" / "one", URI)
    ended(record, files=[Path("out") / "a.pth", tmp_path / "out" / "b.pth"])
    *_, end = read_events(tmp_path / "runs" / "one" / "metrics.jsonl")
    assert [Path(file) for file in end["files"]] == [
        Path("..", "..", "out", name) for name in ("a.pth", "b.pth")
    ]


def test_a_torn_last_line_is_repaired_and_completed_from_the_history(tmp_path: Path) -> None:
    record = started(tmp_path, URI)
    for epoch in (1, 2, 3):
        record.epoch(epoch_metrics(epoch))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    record = started(tmp_path, URI)
    record.resumed(epoch=4, batch=7, history=[epoch_metrics(epoch) for epoch in (1, 2, 3, 4)])
    record.epoch(epoch_metrics(4))
    record.epoch(epoch_metrics(5))
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert epochs_in(tmp_path) == [1, 2, 3, 4, 5]
    assert len({event["run"] for event in events if event["event"] == "start"}) == 1


@pytest.mark.parametrize(
    "line", ['{"eve\0', "5", "null", '["start"]', '{"event": "epoch"}', "\xff"]
)
def test_a_damaged_line_is_named_and_skipped(
    line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"event": "epoch", "time": 1, "epoch": 1}\n'
    path.write_text(f"{whole}{line}\n", encoding="latin-1")
    record = RunRecord(tmp_path)
    record.epoch(epoch_metrics(1))
    record.epoch(epoch_metrics(2))
    assert epochs_in(tmp_path) == [1, 2]
    assert "skipped line 2 of" in caplog.text


def test_a_full_disk_loses_no_line_and_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record = started(tmp_path, URI)

    def full(descriptor: int) -> None:
        os.truncate(descriptor, os.fstat(descriptor).st_size - 30)  # half a line got through
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        record.epoch(epoch_metrics(1))
        record.epoch(epoch_metrics(2))
    assert [message.count("No space left") for message in caplog.messages] == [1]
    record.epoch(epoch_metrics(3))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("epoch") for line in lines] == [None, 1, 2, 3]
    assert "no line was lost" in caplog.text


def test_lines_that_are_lost_for_good_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The record of somebody else, or a folder in its place: opening it fails to the end."""
    (tmp_path / "metrics.jsonl").mkdir()
    record = started(tmp_path, URI)
    record.epoch(epoch_metrics(1))
    ended(record)
    assert "cannot read" in caplog.messages[0]
    assert "buffering its lines in memory" in caplog.messages[1]
    assert caplog.messages[2].endswith("its last 3 lines are lost") and len(caplog.messages) == 3


def test_a_disk_that_cannot_sync_holds_the_record_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_descriptor: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    record = started(tmp_path, URI)
    record.epoch(epoch_metrics(1))
    ended(record)
    assert epochs_in(tmp_path) == [1]
    assert "cannot write" not in caplog.text


def test_time_never_runs_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor for a run that is resumed on a machine whose clock is late."""
    now = iter([1000.0, 400.0, 2000.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr(time, "time", lambda: next(now))
    record = started(tmp_path, URI)
    record.epoch(epoch_metrics(1))
    record.epoch(epoch_metrics(2))
    record = started(tmp_path, URI)
    record.epoch(epoch_metrics(3))
    ended(record)
    times = [event["time"] for event in read_events(tmp_path / "metrics.jsonl")]
    assert times == [1_000_000, 1_000_000, *[2_000_000] * 4]


def test_no_password_is_ever_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tok-from-environment")
    monkeypatch.setenv("DB_PASSWORD", "hunter2-environment")
    params = {"weights": Path("http://me:hunter2@host/w.pth"), "note": "tok-from-environment"}
    record = started(
        tmp_path,
        "postgresql://me:hunter2%40@db.example.org/food?sslpassword=hunter3",
        params=params,
        system={"remote": "hunter2-environment"},
    )
    ended(record)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "hunter" not in text and "tok-" not in text
    history = RunHistory.read(tmp_path / "metrics.jsonl")
    assert history
    assert history.tracking_uri == "postgresql://me:***@db.example.org/food?sslpassword=***"


def test_a_record_without_a_folder_and_a_mirror_without_a_run_do_nothing(tmp_path: Path) -> None:
    record = RunRecord(None)
    record.start(run_name="r", experiment="e", tracking_uri="x", params={}, system={})
    record.resumed(epoch=1, batch=0, history=[epoch_metrics(1)])
    record.epoch(epoch_metrics(2))
    ended(record, files=[Path("a.pth")])
    assert MlflowMirror().close() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "absent"),
    [("record", ["mlflow"]), ("mlflow_mirror", ["mlflow", "torch", "numpy"])],
)
def test_the_trainer_never_imports_mlflow_nor_the_mirror_torch(
    module: str, absent: list[str], tmp_path: Path
) -> None:
    code = f"import sys, training.run.{module}; sys.exit(bool({{*{absent}}} & {{*sys.modules}}))"
    backend = REPOSITORY / "backend"
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(backend)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
