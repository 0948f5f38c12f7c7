"""The record of a run and its mirror: nothing lost, nothing twice, nothing that stops a run."""

import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.run import mlflow_mirror
from training.run import record as tracking
from training.run.mlflow_mirror import sync
from training.run.record import MlflowMirror, RunRecord, read_events

FIVE = ("train_loss", "train_acc", "val_loss", "val_acc", "learning_rate")
BACKEND = Path(tracking.__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*")


def epoch_metrics(epoch: int, **more: float) -> dict[str, Any]:
    values = {name: epoch / 10 + i for i, name in enumerate(FIVE)}
    return {"epoch": epoch, **values, "images_per_second": 50.0, **more}


def started(run_dir: Path, uri: str, **more: Any) -> RunRecord:
    run_dir.mkdir(exist_ok=True)
    record = RunRecord(run_dir)
    facts: dict[str, Any] = {"params": {"epochs": 3, "data": Path("data")}, "system": {"cpus": 2}}
    record.start(run_name=run_dir.name, experiment="tests", tracking_uri=uri, **(facts | more))
    return record


def ended(record: RunRecord, **more: Any) -> None:
    facts: dict[str, Any] = {"metrics": {"test_top1": 0.8, "training_seconds": 12.5}}
    facts |= {"status": "FINISHED", "files": [], "model": None}
    record.end(**(facts | more))


def bring_level(run_dir: Path) -> str:
    result = sync(run_dir, deadline_seconds=60)
    assert result.level, result.message
    return result.message


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store, made once: its tables take MLflow seconds. Its tables only are copied."""
    folder = tmp_path_factory.mktemp("template")
    ended(started(folder / "run", f"sqlite:///{folder / 'mlflow.db'}"))
    bring_level(folder / "run")
    with sqlite3.connect(folder / "mlflow.db") as database:
        for table in ("tags", "params", "metrics", "latest_metrics", "runs", "experiment_tags"):
            database.execute(f"DELETE FROM {table}")
        database.execute("DELETE FROM experiments WHERE name = 'tests'")
    database.close()
    return folder / "mlflow.db"


@pytest.fixture
def store(template: Path, tmp_path: Path) -> str:
    """The URI of a store of one's own."""
    shutil.copy(template, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(scope="module")
def shared_store(template: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("store")
    shutil.copy(template, folder / "mlflow.db")
    return f"sqlite:///{folder / 'mlflow.db'}"


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

    points = {
        name: MlflowClient(uri, uri).get_metric_history(run.info.run_id, name) for name in FIVE
    }
    return {name: sorted((p.step, p.value) for p in found) for name, found in points.items()}


def epochs_in(run_dir: Path) -> list[int]:
    return [e["epoch"] for e in read_events(run_dir / "metrics.jsonl") if e["event"] == "epoch"]


def assert_level(uri: str, run_dir: Path, epochs: int, status: str = "FINISHED") -> None:
    run = the_run(uri, run_dir)
    assert run.info.status == status
    steps = range(1, epochs + 1)
    wanted = {name: [(epoch, epoch / 10 + i) for epoch in steps] for i, name in enumerate(FIVE)}
    assert histories(uri, run) == wanted


def eventually(check: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)


# The record


def test_the_record_holds_the_whole_run_line_by_line(tmp_path: Path) -> None:
    record = started(tmp_path, "sqlite:///mlflow.db")
    record.epoch(epoch_metrics(1, val_loss=float("nan")))
    ended(record, model={"name": "food", "version": 1, "files": [Path("a.pth")]})
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "epoch", "end"]
    assert events[0]["tracking_uri"] == f"sqlite:///{Path('mlflow.db').absolute()}"
    assert events[0]["params"] == {"epochs": 3, "data": "data"}
    assert events[1]["val_loss"] == "nan", "NaN is not JSON"
    assert events[2]["model"]["files"] == ["a.pth"]


def test_a_torn_last_line_is_repaired_and_completed_from_the_history(tmp_path: Path) -> None:
    record = started(tmp_path, "sqlite:///mlflow.db")
    for epoch in (1, 2, 3):
        record.epoch(epoch_metrics(epoch))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    record = started(tmp_path, "sqlite:///mlflow.db")
    record.resumed(epoch=4, batch=7, history=[epoch_metrics(epoch) for epoch in (1, 2, 3, 4)])
    record.epoch(epoch_metrics(4))
    record.epoch(epoch_metrics(5))
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert epochs_in(tmp_path) == [1, 2, 3, 4, 5]
    assert len({event["run"] for event in events if event["event"] == "start"}) == 1


def test_a_damaged_line_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "epoch", "time": 1, "epoch": 1}\n{"eve\0\n')
    record = RunRecord(tmp_path)
    record.epoch(epoch_metrics(1))
    record.epoch(epoch_metrics(2))
    assert epochs_in(tmp_path) == [1, 2]
    assert "Line 2 of" in caplog.text


def test_a_full_disk_loses_no_line_and_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record = started(tmp_path, "sqlite:///mlflow.db")

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


def test_a_record_without_a_folder_and_a_mirror_without_a_run_do_nothing(tmp_path: Path) -> None:
    record = RunRecord(None)
    record.start(run_name="r", experiment="e", tracking_uri="x", params={}, system={})
    record.resumed(epoch=1, batch=0, history=[epoch_metrics(1)])
    record.epoch(epoch_metrics(2))
    ended(record)
    assert MlflowMirror().close() is None
    assert list(tmp_path.iterdir()) == []


def test_the_trainer_never_imports_mlflow() -> None:
    code = "import sys, training.run.record; sys.exit('mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=BACKEND, check=True)


# Levelling

NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_epochs_metrics_reach_the_tracker(
    data: st.DataObject, shared_store: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Property 3, levelled at any moment between epochs, with a new record at any resume."""
    epochs = data.draw(st.lists(st.lists(NUMBERS, min_size=5, max_size=5), max_size=6))
    run_dir = tmp_path_factory.mktemp("run")
    record = started(run_dir, shared_store)
    done: list[dict[str, Any]] = []
    for number, values in enumerate(epochs, start=1):
        done.append({"epoch": number, **dict(zip(FIVE, values, strict=True))})
        record.epoch(done[-1])
        happens = data.draw(st.sampled_from(["nothing", "nothing", "level", "resume"]))
        if happens == "level":
            bring_level(run_dir)
        if happens == "resume":
            record = started(run_dir, shared_store)
            record.resumed(epoch=number, batch=0, history=done)
    ended(record)
    bring_level(run_dir)
    run = the_run(shared_store, run_dir)
    assert run.info.status == "FINISHED"
    wanted = {name: [(metrics["epoch"], metrics[name]) for metrics in done] for name in FIVE}
    assert histories(shared_store, run) == wanted


def test_a_finished_run_is_mirrored_whole_and_only_once(store: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    run_dir = tmp_path / "a run"
    odd = {"epochs": 3, "odd*name?/..": 1, "..": 2, "long": "x" * 9000, "none": None}
    record = started(run_dir, store, params=odd, system={"gpu [0]": "none"})
    for name in ("food_model_v7.pth", "food_model_v7.json", "report.html"):
        (run_dir / name).write_text(name)
    record.epoch(epoch_metrics(1, **{"loss: a/b?": 2.0}))
    record.epoch(epoch_metrics(2))
    files = ["food_model_v7.pth", "food_model_v7.json"]
    model = {"name": "nutrilearn-food", "version": 7, "files": files}
    ended(record, model=model, files=[*files, str(run_dir / "report.html"), "gone.png"])
    assert "gone.png" in bring_level(run_dir)
    first = the_run(store, run_dir)
    assert "gone.png" not in bring_level(run_dir), "the second time there is nothing to do"
    assert_level(store, run_dir, epochs=2)
    run = the_run(store, run_dir)
    assert run.info.end_time == first.info.end_time
    assert run.data.metrics["test_top1"] == 0.8
    assert run.data.metrics["loss_ a_b_"] == 2.0
    assert run.data.params["odd_name__"] == "1" and len(run.data.params["long"]) == 6000
    assert run.data.tags["system.gpu _0_"] == "none"
    client = MlflowClient(store, store)
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"model", "report.html"}
    (version,) = client.search_model_versions("name = 'nutrilearn-food'")
    assert version.tags["food_model_version"] == "7" and version.run_id == run.info.run_id
    source = client.get_model_version_download_uri("nutrilearn-food", version.version)
    assert source.startswith((tmp_path / "mlartifacts").as_uri()) and source.endswith("/model")
    got = {file.path: file.file_size for file in client.list_artifacts(run.info.run_id, "model")}
    assert got == {f"model/{name}": len(name) for name in files}


WRITING = {
    "create_run": 1,
    "log_batch": 2,
    "log_artifact": 1,
    "create_registered_model": 1,
    "create_model_version": 1,
    "set_terminated": 1,
}


@pytest.mark.parametrize("fault", ["not stored", "stored, answer lost"])
@pytest.mark.parametrize("call", range(1, sum(WRITING.values()) + 1))
def test_a_failure_in_any_call_loses_nothing_and_stores_nothing_twice(
    call: int, fault: str, shared_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    calls = iter(range(1, 100))
    sent: Counter[tuple[str, int]] = Counter()

    def broken(method: Any) -> Any:
        def call_and_fail(*args: Any, **kwargs: Any) -> Any:
            fails = next(calls) == call
            if fails and fault == "not stored":
                raise ConnectionError("no route")
            answer = method(*args, **kwargs)
            sent.update((metric.key, metric.step) for metric in kwargs.get("metrics", []))
            if fails:
                raise ConnectionError("no route")
            return answer

        return call_and_fail

    run_dir = tmp_path / "run"
    record = started(run_dir, shared_store)
    for epoch in (1, 2):
        record.epoch(epoch_metrics(epoch))
    (run_dir / "model.pth").write_text("weights")
    name = f"food-{call}-{fault[0:3]}"
    ended(record, model={"name": name, "version": 1, "files": ["model.pth"]})
    for method in WRITING:
        monkeypatch.setattr(MlflowClient, method, broken(getattr(MlflowClient, method)))
    levelling = mlflow_mirror._Levelling(run_dir)
    result = levelling.attempt(deadline=math.inf, over=True)
    assert not result.level and "no route" in result.message
    if fault != "not stored":
        levelling = mlflow_mirror._Levelling(run_dir)  # a new process, which knows nothing
    assert levelling.attempt(deadline=math.inf, over=True).level
    assert_level(shared_store, run_dir, epochs=2)
    assert set(sent.values()) == {1}, "SQL stores drop repeated points, other servers keep them"
    client = MlflowClient(shared_store, shared_store)
    assert len(client.search_model_versions(f"name = '{name}'")) == 1


def test_a_removed_database_is_filled_again(template: Path, store: str, tmp_path: Path) -> None:
    """By a process of its own: MLflow keeps a removed file open while its process lives."""
    run_dir = tmp_path / "run"
    record = started(run_dir, store)
    record.epoch(epoch_metrics(1))
    bring_level(run_dir)
    (tmp_path / "mlflow.db").unlink()
    record.epoch(epoch_metrics(2))
    ended(record)
    result = sync(run_dir, deadline_seconds=60)
    assert not result.level and "--sync_mlflow" in result.message
    shutil.copy(template, tmp_path / "mlflow.db")
    code = "import sys, pathlib; from training.run.mlflow_mirror import sync;"
    code += "sys.exit(not sync(pathlib.Path(sys.argv[1]), deadline_seconds=60).level)"
    subprocess.run([sys.executable, "-c", code, str(run_dir)], cwd=BACKEND, check=True)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        rows = database.execute("SELECT key, step FROM metrics").fetchall()
    database.close()
    assert Counter(rows) == Counter(
        (key, e) for key in (*FIVE, "images_per_second") for e in (1, 2)
    ) + Counter([("test_top1", 2), ("training_seconds", 2)])


def test_a_deadline_that_passes_is_said(store: str, tmp_path: Path) -> None:
    record = started(tmp_path / "run", store)
    record.epoch(epoch_metrics(1))
    result = sync(tmp_path / "run", deadline_seconds=-1)
    assert not result.level and "ran out" in result.message
    assert "\n" not in result.message


def test_a_folder_without_a_run_is_said(tmp_path: Path) -> None:
    assert "holds no start" in sync(tmp_path, deadline_seconds=1).message
    result = sync(tmp_path / "nowhere", deadline_seconds=1)
    assert not result.level and "nowhere" in result.message


def test_two_processes_never_level_one_run_at_once(store: str, tmp_path: Path) -> None:
    started(tmp_path / "run", store)
    with mlflow_mirror._only_one(tmp_path / "run", lambda: True):
        result = sync(tmp_path / "run", deadline_seconds=0)
    assert not result.level and "another process" in result.message
    bring_level(tmp_path / "run")


# The mirror process


@pytest.fixture
def mirrors() -> Iterator[list[MlflowMirror]]:
    """Handles whose processes are ended after the test, done or not."""
    handles: list[MlflowMirror] = []
    yield handles
    for handle in handles:
        if handle.process:
            handle.process.kill()
            handle.process.communicate()


def test_the_mirror_follows_a_run_to_its_end(
    store: str, tmp_path: Path, mirrors: list[MlflowMirror]
) -> None:
    run_dir = tmp_path / "run"
    record = started(run_dir, store)
    mirrors.append(MlflowMirror.launch(run_dir))
    process = mirrors[0].process
    assert process
    record.epoch(epoch_metrics(1))

    def first_epoch_is_there() -> bool:
        from mlflow import MlflowClient

        runs = MlflowClient(store, store).search_runs(["1", "2"])
        return bool(runs) and runs[0].data.metrics.get("val_acc") is not None

    eventually(first_epoch_is_there)
    assert the_run(store, run_dir).info.status == "RUNNING"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    record.epoch(epoch_metrics(2))
    ended(record)
    assert mirrors[0].close(60) == "MLflow is level: experiment tests, run run"
    assert_level(store, run_dir, epochs=2)


TRAINER = """
import sys, time
from pathlib import Path
from training.run.record import MlflowMirror, RunRecord
run_dir, uri = Path(sys.argv[1]), sys.argv[2]
record = RunRecord(run_dir)
record.start(run_name="run", experiment="tests", tracking_uri=uri, params={}, system={})
mirror = MlflowMirror.launch(run_dir)
record.epoch({"epoch": 1, "train_loss": 0.1, "train_acc": 1.1, "val_loss": 2.1, "val_acc": 3.1,
              "learning_rate": 4.1})
print(mirror.process.pid, flush=True)
time.sleep(600)
"""


def test_a_killed_trainer_leaves_a_killed_run_that_resumes(
    store: str, tmp_path: Path, mirrors: list[MlflowMirror]
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    command = [sys.executable, "-c", TRAINER, str(run_dir), store]
    with subprocess.Popen(command, cwd=BACKEND, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout and int(trainer.stdout.readline())
        trainer.kill()
    record = started(run_dir, store)  # at once, while the first mirror is still at work
    record.resumed(epoch=1, batch=0, history=[epoch_metrics(1)])
    mirrors.append(MlflowMirror.launch(run_dir))
    eventually(lambda: "MLflow is level" in (run_dir / "mlflow.log").read_text())
    record.epoch(epoch_metrics(2))
    ended(record)
    assert "MLflow is level" in str(mirrors[0].close(60))
    assert_level(store, run_dir, epochs=2)


def test_a_run_without_an_end_is_killed_until_it_is_resumed(store: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    started(run_dir, store).epoch(epoch_metrics(1))
    bring_level(run_dir)
    assert_level(store, run_dir, epochs=1, status="KILLED")
    record = started(run_dir, store)
    levelling = mlflow_mirror._Levelling(run_dir)
    assert levelling.attempt(deadline=math.inf, over=False).level
    assert_level(store, run_dir, epochs=1, status="RUNNING")
    record.epoch(epoch_metrics(2))
    ended(record)
    bring_level(run_dir)
    assert_level(store, run_dir, epochs=2)


@pytest.fixture(params=["refused", "silent", "locked", "full", "missing"])
def fault(
    request: pytest.FixtureRequest,
    store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    """A tracking URI behind which MLflow is dead in one way."""
    if request.param in ("refused", "silent"):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            if request.param == "silent":
                server.listen()
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
    elif request.param == "locked":
        database = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
        database.execute("BEGIN EXCLUSIVE")
        yield store
        database.close()
    elif request.param == "full":
        if not Path("/dev/full").exists():
            pytest.skip("needs Linux's disk that is always full")
        yield "sqlite:////dev/full"
    else:
        (tmp_path / "shim").mkdir()
        shim = "raise ImportError(\"No module named 'mlflow'\")"
        (tmp_path / "shim" / "mlflow.py").write_text(shim)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shim"))
        yield store


def test_a_dead_mlflow_stops_nothing_and_is_made_level_later(
    fault: str, template: Path, tmp_path: Path, mirrors: list[MlflowMirror]
) -> None:
    run_dir = tmp_path / "run"
    record = started(run_dir, fault)
    mirrors.append(MlflowMirror.launch(run_dir))
    for epoch in (1, 2, 3):
        record.epoch(epoch_metrics(epoch))
    ended(record)
    message = str(mirrors[0].close(3.0))
    assert message.startswith("MLflow is behind: ") and "\n" not in message
    assert f'--sync_mlflow "{run_dir}"' in message
    assert epochs_in(run_dir) == [1, 2, 3]
    assert mirrors[0].process
    mirrors[0].process.kill()  # so that its lock is free
    mirrors[0].process.communicate()
    shutil.copy(template, tmp_path / "good.db")
    good = f"sqlite:///{tmp_path / 'good.db'}"
    assert sync(run_dir, deadline_seconds=60, tracking_uri=good).level
    assert_level(good, run_dir, epochs=3)


def test_a_mirror_that_cannot_start_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    mirror = MlflowMirror.launch(tmp_path)
    assert "training goes on" in caplog.text
    assert "MLflow is behind: its process could not start" in str(mirror.close())


def test_a_mirror_that_dies_is_said(tmp_path: Path, mirrors: list[MlflowMirror]) -> None:
    mirrors.append(MlflowMirror.launch(tmp_path))
    assert mirrors[0].process
    mirrors[0].process.kill()
    mirrors[0].process.wait()
    assert "its process ended with code -9" in str(mirrors[0].close())
