"""Syncing MLflow with a record: everything arrives, once, where people look for it."""

import contextlib
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tracked_runs import (
    FIVE,
    assert_in_sync,
    bring_in_sync,
    ended,
    epoch_metrics,
    finished_run,
    histories,
    started,
    the_run,
)

from training.config import REPOSITORY
from training.run.history import read_events
from training.run.mlflow_store import local_folder
from training.run.mlflow_sync import Sync, only_one, sync

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*"),
]

DATA = {"name": "food-101", "digest": "0123abcd", "source": "/photos/food-101", "classes": 3}
DATA |= {"train": 8, "val": 2, "test": 5}
NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=32)


@pytest.fixture(scope="module")
def shared_store(template: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("store")
    shutil.copy(template, folder / "mlflow.db")
    return f"sqlite:///{folder / 'mlflow.db'}"


def in_a_new_process(code: str, folder: Path) -> list[str]:
    """What it prints, line by line: MLflow keeps files open while a process lives."""
    backend = {"PYTHONPATH": str(REPOSITORY / "backend"), "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **backend}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_epochs_metrics_reach_the_tracker(
    data: st.DataObject, shared_store: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Property 3, synced at any moment between epochs, with a new record at any resume."""
    epochs = data.draw(st.lists(st.lists(NUMBERS, min_size=5, max_size=5), max_size=6))
    run_dir = tmp_path_factory.mktemp("run")
    record = started(run_dir, shared_store)
    done: list[dict[str, Any]] = []
    for number, values in enumerate(epochs, start=1):
        done.append({"epoch": number, **dict(zip(FIVE, values, strict=True))})
        record.epoch(done[-1])
        happens = data.draw(st.sampled_from(["nothing", "nothing", "sync", "resume"]))
        if happens == "sync":
            bring_in_sync(run_dir)
        if happens == "resume":
            record = started(run_dir, shared_store)
            record.resumed(epoch=number, batch=0, history=done)
    ended(record)
    bring_in_sync(run_dir)
    run = the_run(shared_store, run_dir)
    assert run.info.status == "FINISHED"
    wanted = {name: [(metrics["epoch"], metrics[name]) for metrics in done] for name in FIVE}
    assert histories(shared_store, run) == wanted


def test_a_finished_run_is_mirrored_whole_and_only_once(store: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    run_dir = tmp_path / "a run"
    odd = {"epochs": 3, "odd*name?/..": 1, "..": 2, "long": "x" * 9000, "none": None}
    record = started(run_dir, store, params=odd, system={"gpu [0]": "none"})
    names = ["food_model_v7.pth", "food_model_v7.json"]
    for name in (*names, "report.html"):
        (run_dir / name).write_text(name)
    record.epoch(epoch_metrics(1, **{"loss: a/b?": 2.0}))
    record.epoch(epoch_metrics(2))
    files = [run_dir / name for name in names]
    model = {"name": "nutrilearn-food", "version": 7, "files": files}
    ended(record, model=model, files=[*files, run_dir / "report.html", run_dir / "gone.png"])
    message = bring_in_sync(run_dir)
    assert "(skipped, not found: gone.png; v7 is stored as plain files: its record" in message
    first = the_run(store, run_dir)
    assert "gone.png" not in bring_in_sync(run_dir), "the second time there is nothing to do"
    assert_in_sync(store, run_dir, epochs=2)
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
    assert got == {f"model/{name}": len(name) for name in names}


def test_what_a_run_trains_on_and_with_which_code_is_there_to_filter_by(
    store: str, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    git = {"git_commit": "0" * 40, "git_dirty": "true"}
    params = {"model_name": "mobilenet_v2", "weights": "imagenet"}
    started(tmp_path / "run", store, data=DATA, params=params, system={"cpus": 2, **git})
    bring_in_sync(tmp_path / "run")
    bring_in_sync(tmp_path / "run")
    client = MlflowClient(store, store)
    (experiment,) = client.search_experiments(filter_string="name = 'tests'")
    (run,) = client.search_runs(
        [experiment.experiment_id],
        "tags.model_name = 'mobilenet_v2' and tags.dataset_digest = '0123abcd' "
        "and tags.num_classes = '3' and dataset.name = 'food-101'",
    )
    assert run.data.tags["mlflow.source.git.commit"] == "0" * 40
    assert run.data.tags["mlflow.source.git.dirty"] == "true"
    assert run.data.tags["system.cpus"] == "2"
    (logged,) = run.inputs.dataset_inputs
    assert json.loads(logged.dataset.source) == {"uri": "/photos/food-101"}
    counts = {"num_rows": 15, "classes": 3, "train": 8, "val": 2, "test": 5}
    assert json.loads(logged.dataset.profile) == counts


WRITING = {
    "create_run": 1,
    "log_batch": 2,
    "log_inputs": 1,
    "log_artifact": 1,
    "create_registered_model": 1,
    "create_model_version": 1,
    "set_tag": 1,
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
    record = started(run_dir, shared_store, data=DATA)
    for epoch in (1, 2):
        record.epoch(epoch_metrics(epoch))
    (run_dir / "model.pth").write_text("weights")
    name = f"food-{call}-{fault[0:3]}"
    ended(record, model={"name": name, "version": 1, "files": [run_dir / "model.pth"]})
    for method in WRITING:
        monkeypatch.setattr(MlflowClient, method, broken(getattr(MlflowClient, method)))
    syncing = Sync(run_dir)
    result = syncing.attempt(deadline=math.inf, over=True)
    assert not result.in_sync and "no route" in result.message
    if fault != "not stored":
        syncing = Sync(run_dir)  # a new process, which knows nothing
    assert syncing.attempt(deadline=math.inf, over=True).in_sync
    assert_in_sync(shared_store, run_dir, epochs=2)
    assert set(sent.values()) == {1}, "SQL stores drop repeated points, other servers keep them"
    client = MlflowClient(shared_store, shared_store)
    assert len(client.search_model_versions(f"name = '{name}'")) == 1
    assert len(the_run(shared_store, run_dir).inputs.dataset_inputs) == 1


def test_a_removed_database_is_filled_again(template: Path, store: str, tmp_path: Path) -> None:
    """By a process of its own: MLflow keeps a removed file open while its process lives."""
    run_dir = tmp_path / "run"
    record = started(run_dir, store)
    record.epoch(epoch_metrics(1))
    bring_in_sync(run_dir)
    (tmp_path / "mlflow.db").unlink()
    record.epoch(epoch_metrics(2))
    ended(record)
    assert not sync(run_dir, deadline_seconds=60).in_sync
    shutil.copy(template, tmp_path / "mlflow.db")
    code = "from pathlib import Path; from training.run.mlflow_sync import sync;"
    code += "print(sync(Path('run'), deadline_seconds=60).in_sync)"
    assert in_a_new_process(code, tmp_path) == ["True"]
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        rows = database.execute("SELECT key, step FROM metrics").fetchall()
    assert Counter(rows) == Counter(
        (key, e) for key in (*FIVE, "images_per_second") for e in (1, 2)
    ) + Counter([("test_top1", 2), ("training_seconds", 2)])


def test_a_run_without_an_end_is_killed_until_it_is_resumed(store: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    started(run_dir, store).epoch(epoch_metrics(1))
    bring_in_sync(run_dir)
    assert_in_sync(store, run_dir, epochs=1, status="KILLED")
    record = started(run_dir, store)
    assert Sync(run_dir).attempt(deadline=math.inf, over=False).in_sync
    assert_in_sync(store, run_dir, epochs=1, status="RUNNING")
    record.epoch(epoch_metrics(2))
    ended(record)
    bring_in_sync(run_dir)
    assert_in_sync(store, run_dir, epochs=2)


def test_a_deadline_that_passes_is_told(store: str, tmp_path: Path) -> None:
    started(tmp_path / "run", store).epoch(epoch_metrics(1))
    result = sync(tmp_path / "run", deadline_seconds=-1)
    assert not result.in_sync and "not enough time" in result.message
    assert "\n" not in result.message


@pytest.mark.parametrize("name", ["", "nowhere", "a file"])
def test_a_place_without_a_run_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    result = sync(tmp_path / name, deadline_seconds=1)
    where = tmp_path / name
    assert not result.in_sync
    assert result.message == (
        f"MLflow is out of sync: there is no run in {where}: it has no metrics.jsonl"
    )


def test_two_processes_never_sync_one_run_at_once(store: str, tmp_path: Path) -> None:
    started(tmp_path / "run", store)
    with only_one(tmp_path / "run", lambda: True):
        result = sync(tmp_path / "run", deadline_seconds=0)
    assert not result.in_sync and "another process" in result.message
    bring_in_sync(tmp_path / "run")


# Where it arrives -----------------------------------------------------------------------------


def runs_of(project: Path) -> list[str]:
    """What the database in a project lists, as `mlflow ui` in its folder does."""
    with contextlib.closing(sqlite3.connect(project / "mlflow.db")) as database:
        rows = database.execute("SELECT name, artifact_uri FROM runs ORDER BY name").fetchall()
    found = []
    for name, uri in rows:
        folder = local_folder(uri)
        assert folder
        found.append(f"{name}: {', '.join(os.listdir(folder / 'model'))}")
    return found


@pytest.mark.parametrize("name", ["my%20food #1", "what? Grüße"])
def test_a_project_with_any_name_keeps_everything_in_itself(
    name: str, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / name
    project.mkdir()
    shutil.copy(template, project / "mlflow.db")
    monkeypatch.chdir(project)
    finished_run(project / "run", "sqlite:///mlflow.db", files={"a.pth": "weights"})
    monkeypatch.chdir(tmp_path)
    said = in_a_new_process(
        "from pathlib import Path\n"
        "from training.run.mlflow_sync import sync\n"
        f"print(sync(Path({name!r}, 'run'), deadline_seconds=60).message, Path.cwd())",
        tmp_path,
    )
    assert said == [f"MLflow is in sync: experiment tests, run run {tmp_path}"]
    assert runs_of(project) == ["run: a.pth"]
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing beside the project"


def moved_project(template: Path, tmp_path: Path) -> Path:
    """One run before the move, which MLflow has, and one that it has not."""
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(template, old / "mlflow.db")
    for name in ("one", "two"):
        uri = f"sqlite:///{old / 'mlflow.db'}"
        finished_run(old / "checkpoints" / name, uri, files={f"{name}.pth": "weights"})
    bring_in_sync(old / "checkpoints" / "one")
    (tmp_path / "old").rename(tmp_path / "new")
    return tmp_path / "new"


def test_a_project_that_moved_takes_its_runs_and_artifacts_with_it(
    template: Path, tmp_path: Path
) -> None:
    project = moved_project(template, tmp_path)
    message = bring_in_sync(project / "checkpoints" / "two")
    assert f"the project moved, and with it the artifacts of {tmp_path / 'old'}" in message
    assert runs_of(project) == ["one: one.pth", "two: two.pth"]
    assert not (tmp_path / "old").exists(), "the old place must not come back"


def test_a_copied_project_syncs_with_its_own_database(template: Path, tmp_path: Path) -> None:
    project = moved_project(template, tmp_path)
    shutil.copytree(project, tmp_path / "old")
    before = (tmp_path / "old" / "mlflow.db").read_bytes()
    message = bring_in_sync(project / "checkpoints" / "two")
    assert (tmp_path / "old" / "mlflow.db").read_bytes() == before
    assert f"(artifacts in {tmp_path / 'old' / 'mlartifacts'})" in message


def test_a_run_whose_project_is_gone_asks_for_the_database(template: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "elsewhere" / "two"
    run_dir.parent.mkdir()
    project = moved_project(template, tmp_path)
    shutil.move(project / "checkpoints" / "two", run_dir)
    result = sync(run_dir, deadline_seconds=60)
    assert not result.in_sync
    assert f"the folder {tmp_path / 'old'} does not exist" in result.message
    assert "--tracking_uri sqlite:///PATH" in result.message
    bring_in_sync(run_dir, f"sqlite:///{project / 'mlflow.db'}")
    assert not (tmp_path / "old").exists()


def test_a_password_is_asked_for_as_the_record_keeps_none(store: str, tmp_path: Path) -> None:
    finished_run(tmp_path / "run", "http://me:secret@127.0.0.1:9")
    result = sync(tmp_path / "run", deadline_seconds=60)
    assert "add --tracking_uri http://me:***@127.0.0.1:9 with it" in result.message
    result = sync(
        tmp_path / "run", deadline_seconds=60, tracking_uri="http://me:secret@127.0.0.1:9"
    )
    assert "refused" in result.message and "secret" not in result.message
    bring_in_sync(tmp_path / "run", store)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://127.0.0.1:9", "refused"),
        ("localhost:5000", "unsupported URI 'localhost:5000'"),
        ("mlruns", "maintenance mode"),
        ("mysql://127.0.0.1:9/food", "the Python module MySQLdb, which is not installed"),
        ("https://me:hunter2@@@/", "No host supplied"),
        ("nonsense://me:hunter2@host", "unsupported URI 'nonsense://me:***@host'"),
        ("sqlite:////dev/full", "full"),
    ],
)
def test_a_store_that_cannot_be_reached_is_one_line_with_its_cause(
    uri: str, said: str, tmp_path: Path
) -> None:
    finished_run(tmp_path / "run", "sqlite:///mlflow.db")
    result = sync(tmp_path / "run", deadline_seconds=60, tracking_uri=uri)
    assert not result.in_sync and "\n" not in result.message
    assert said in result.message and "hunter2" not in result.message


def test_an_experiment_of_a_server_takes_all_but_the_files(store: str, tmp_path: Path) -> None:
    """`mlflow ui` made it, on the same database: only a server can store its artifacts."""
    from mlflow import MlflowClient

    MlflowClient(store, store).create_experiment("tests", "mlflow-artifacts:/1")
    finished_run(tmp_path / "run", store, files={"a.pth": "weights"})
    for _ in range(2):
        result = sync(tmp_path / "run", deadline_seconds=60)
        assert not result.in_sync and "a server made this experiment" in result.message
        assert_in_sync(store, tmp_path / "run", epochs=1)


def test_events_that_are_damaged_are_skipped(store: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    finished_run(run_dir, store)
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'null\n{"event"\n')
    bring_in_sync(run_dir)
    assert [event["event"] for event in read_events(run_dir / "metrics.jsonl")] == [
        *("start", "epoch", "end")
    ]
