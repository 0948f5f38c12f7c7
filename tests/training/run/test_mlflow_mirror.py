"""The mirror process: it follows a run to its end, and nothing about it stops one."""

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.short_runs import free_port
from tests.support.tracked_runs import (
    assert_in_sync,
    bring_in_sync,
    ended,
    epoch_metrics,
    epochs_in,
    eventually,
    finished_run,
    started,
    the_run,
)

from training.config import REPOSITORY
from training.run import mlflow_mirror, mlflow_run
from training.run.mlflow_mirror import MlflowMirror
from training.run.mlflow_sync import sync

BACKEND = REPOSITORY / "backend"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*"),
]

Launch = Callable[[Path, str], MlflowMirror]


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Start a mirror, whose process is ended after the test, done or not."""
    handles: list[MlflowMirror] = []

    def launch_one(run_dir: Path, uri: str) -> MlflowMirror:
        handles.append(MlflowMirror.launch(run_dir, uri))
        return handles[-1]

    yield launch_one
    for handle in handles:
        if handle.process:
            handle.process.kill()
            handle.process.communicate()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that other tests keep busy needs longer than a person would wait."""
    monkeypatch.setattr(mlflow_mirror, "CLOSE_SECONDS", 60)


@pytest.mark.usefixtures("patient")
def test_the_mirror_follows_a_run_to_its_end(store: str, tmp_path: Path, launch: Launch) -> None:
    run_dir = tmp_path / "run"
    record = started(run_dir, store)
    mirror = launch(run_dir, store)
    assert mirror.process
    record.epoch(epoch_metrics(1))

    def first_epoch_is_there() -> bool:
        from mlflow import MlflowClient

        runs = MlflowClient(store, store).search_runs(["1", "2"])
        return bool(runs) and runs[0].data.metrics.get("val_acc") is not None

    eventually(first_epoch_is_there)
    assert the_run(store, run_dir).info.status == "RUNNING"
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            mirror.process.send_signal(getattr(signal, name))
    record.epoch(epoch_metrics(2))
    ended(record)
    assert mirror.close() == "MLflow is in sync: experiment tests, run run"
    assert_in_sync(store, run_dir, epochs=2)


TRAINER = """
import sys, time
from pathlib import Path
from training.run.mlflow_mirror import MlflowMirror
from training.run.record import RunRecord
run_dir, uri = Path(sys.argv[1]), sys.argv[2]
record = RunRecord(run_dir)
record.start(run_name="run", experiment="tests", tracking_uri=uri, params={}, system={})
mirror = MlflowMirror.launch(run_dir, uri)
record.epoch({"epoch": 1, "train_loss": 0.1, "train_acc": 1.1, "val_loss": 2.1, "val_acc": 3.1,
              "learning_rate": 4.1})
print(mirror.process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.usefixtures("patient")
def test_a_killed_trainer_leaves_a_killed_run_that_resumes(
    store: str, tmp_path: Path, launch: Launch
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    command = [sys.executable, "-c", TRAINER, str(run_dir), store]
    with subprocess.Popen(command, cwd=BACKEND, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout and int(trainer.stdout.readline())
        trainer.kill()
    record = started(run_dir, store)  # at once, while the first mirror is still at work
    record.resumed(epoch=1, batch=0, history=[epoch_metrics(1)])
    mirror = launch(run_dir, store)
    eventually(lambda: "MLflow is in sync" in (run_dir / "mlflow.log").read_text())
    record.epoch(epoch_metrics(2))
    ended(record)
    assert "MLflow is in sync" in str(mirror.close())
    assert_in_sync(store, run_dir, epochs=2)


# MLflow fails -----------------------------------------------------------------------------------


@pytest.fixture(params=["refused", "silent", "locked", "full", "missing", "no folder"])
def fault(
    request: pytest.FixtureRequest,
    store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[str, str]]:
    """A tracking URI behind which MLflow is dead in one way, and what is said of it."""
    if request.param in ("refused", "silent"):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            if request.param == "silent":
                server.listen()
            said = "timed out" if request.param == "silent" else "Connection refused"
            yield f"http://127.0.0.1:{server.getsockname()[1]}", said
    elif request.param == "locked":
        database = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
        database.execute("BEGIN EXCLUSIVE")
        yield store, "another program has it locked"
        database.close()
    elif request.param == "full":
        if not Path("/dev/full").exists():
            pytest.skip("needs Linux's disk that is always full")
        yield "sqlite:////dev/full", "database or disk is full"
    elif request.param == "no folder":
        (tmp_path / "a file").touch()
        yield f"sqlite:///{tmp_path}/a file/mlflow.db", "a file"
    else:
        (tmp_path / "shim").mkdir()
        shim = "raise ImportError(\"No module named 'mlflow'\")"
        (tmp_path / "shim" / "mlflow.py").write_text(shim)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shim"))
        yield store, "mlflow cannot be imported"


def test_a_dead_mlflow_stops_nothing_is_told_by_its_cause_and_synced_later(
    fault: tuple[str, str],
    template: Path,
    tmp_path: Path,
    launch: Launch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri, said = fault
    monkeypatch.setattr(mlflow_mirror, "CLOSE_SECONDS", 3)
    run_dir = tmp_path / "run"
    record = started(run_dir, uri)
    mirror = launch(run_dir, uri)
    for epoch in (1, 2, 3):
        record.epoch(epoch_metrics(epoch))
    eventually(lambda: "out of sync" in (run_dir / "mlflow.log").read_text())
    ended(record)
    began = time.monotonic()
    message = str(mirror.close())
    assert time.monotonic() - began < 4
    assert message.startswith("MLflow is out of sync: ") and "\n" not in message
    assert said in message
    assert "metrics.jsonl is the record" in message and "--sync_mlflow" in message
    assert epochs_in(run_dir) == [1, 2, 3]
    assert mirror.process
    mirror.process.kill()  # so that its lock is free
    mirror.process.communicate()
    shutil.copy(template, tmp_path / "good.db")
    good = f"sqlite:///{tmp_path / 'good.db'}"
    bring_in_sync(run_dir, good)
    assert_in_sync(good, run_dir, epochs=3)


def test_a_mirror_that_cannot_start_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    mirror = MlflowMirror.launch(tmp_path, "sqlite:///mlflow.db")
    assert "continuing without it" in caplog.text
    assert "MLflow is out of sync: its process could not start" in str(mirror.close())


def test_a_mirror_that_dies_is_told(tmp_path: Path, launch: Launch) -> None:
    mirror = launch(tmp_path, "sqlite:///mlflow.db")
    assert mirror.process
    mirror.process.kill()
    mirror.process.wait()
    assert "its process ended with code -9" in str(mirror.close())


def test_files_of_the_current_folder_are_not_taken_for_libraries(
    store: str, tmp_path: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "random.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path / "here")
    run_dir = tmp_path / "run"
    finished_run(run_dir, store)
    launch(run_dir, store)
    eventually(lambda: "MLflow is in sync" in (run_dir / "mlflow.log").read_text())


def test_the_command_to_sync_later_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell hands over the folder by its name, and the script as the trainer was started."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    monkeypatch.setattr(sys, "argv", ["../backend/train_model.py", "--epochs", "3"])
    run_dir = tmp_path / "it's $HOME `here`"
    run_dir.mkdir()
    command = str(MlflowMirror.launch(run_dir, "x").close()).partition("run: ")[2]
    echo = f"python() {{ printf '%s\\n' \"$@\"; }}; {command}"
    said = subprocess.run(["sh", "-c", echo], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["../backend/train_model.py", "--sync_mlflow", str(run_dir)]


def test_no_password_is_seen_in_log_message_or_arguments(
    tmp_path: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that cannot be sent is what requests prints in its error."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "to-ken-\N{SNOWMAN}\nnext")
    uri = "http://me:hunter2@127.0.0.1:9"
    run_dir = tmp_path / "run"
    finished_run(run_dir, uri)
    mirror = launch(run_dir, uri)
    assert mirror.process and "hunter2" not in " ".join(map(str, mirror.process.args))
    eventually(lambda: "out of sync" in (run_dir / "mlflow.log").read_text())
    message = str(mirror.close())
    assert message.count("http://me:***@127.0.0.1:9") == 2, "in the cause and in the command"
    for text in (message, (run_dir / "mlflow.log").read_text()):
        assert "hunter2" not in text and "to-ken" not in text


# Servers --------------------------------------------------------------------------------------


@contextlib.contextmanager
def mlflow_server(folder: Path, *options: str) -> Iterator[str]:
    """A real one, on the store in this folder; its URI."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", port, "--workers", "1"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--backend-store-uri", "sqlite:///mlflow.db", *options],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        eventually(lambda: "startup complete" in (folder / "server.log").read_text())
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs Linux's /proc")
@pytest.mark.usefixtures("store")
def test_artifacts_go_where_the_server_can_see_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that serves no artifacts names a folder of its own machine. Here that is one which
    every process sees in its own working folder, as if each had a disk of its own."""
    root = "/proc/self/cwd/artifacts"
    here = tmp_path / "other machine"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(mlflow_run, "SHARED_DISK_PAUSES", (0.0, 0.1))
    with mlflow_server(tmp_path, "--no-serve-artifacts", "--default-artifact-root", root) as uri:
        finished_run(here / "run", uri, files={"a.pth": "weights", "b.json": "{}"})
        for _ in range(2):  # the second time, MLflow has all the rest
            result = sync(here / "run", deadline_seconds=60)
            assert not result.in_sync
            assert f"the server keeps artifacts in its folder {root}" in result.message
            assert (
                "another folder on this machine; start it with --serve-artifacts" in result.message
            )
            assert_in_sync(uri, here / "run", epochs=1)
        assert os.listdir(here) == ["run"], "nothing is left on the wrong disk"
        monkeypatch.chdir("/proc")
        result = sync(here / "run", deadline_seconds=60)
        assert not result.in_sync and "which cannot be written here" in result.message
        monkeypatch.chdir(tmp_path)  # the disk is mounted
        bring_in_sync(here / "run")
        stored = [path.name for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]
        assert sorted(stored) == ["a.pth", "b.json"]
