"""Copying the record of a run to MLflow, by the mirror process or by --sync_mlflow.

What is stored already is asked of MLflow itself: the run is found by its tag, steps by the metric
history, versions by the run, and the end time is set last. Syncing twice, or after a crash at any
point, stores nothing twice. Registered versions get no alias: which one is the champion is for
people to say; the tag `food_model_version` tells which files a version is.
"""

import contextlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout

from app.ml.durable import file_lock
from training.errors import TrackingError
from training.run.history import RECORD_NAME, RunHistory
from training.run.mlflow_store import (
    ARTIFACTS_NAME,
    check_database,
    local_folder,
    relocate_artifacts,
)
from training.uris import HIDDEN, absolute_uri, database_file, sqlite_uri, without_password

LOCK_NAME = "mlflow.lock"
LOCK_POLL_SECONDS = 0.25
RUN_TAG = "nutrilearn.run"
PROVIDERS = ["CPUExecutionProvider"]
SHARED_DISK_PAUSES = (0.0, 1.0, 3.0)  # seconds; such a disk may show new files late
MLFLOW_ENVIRONMENT = {  # defaults only: what the user has set stands
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the mirror retries; 7 retries block for 246 s
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncResult:
    """Whether MLflow holds all that the record says; `message` is one line for people."""

    in_sync: bool
    message: str


def out_of_sync(reason: str) -> SyncResult:
    line = without_password(" ".join(reason.split())).rstrip(".")
    return SyncResult(False, f"MLflow is out of sync: {line}")


def sync(run_dir: Path, *, deadline_seconds: float, tracking_uri: str | None = None) -> SyncResult:
    """Sync MLflow with the record of a run that no trainer is working on; safe to repeat.

    A record without an end is that of a killed run. `tracking_uri` replaces the one in the record,
    which holds no password. The deadline is checked between calls to MLflow.
    """
    if not (run_dir / RECORD_NAME).is_file():
        return out_of_sync(f"there is no run in {run_dir}: it has no {RECORD_NAME}")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # its tracebacks: one line is told
    deadline = time.monotonic() + deadline_seconds
    try:
        with only_one(run_dir, lambda: time.monotonic() > deadline):
            return Sync(run_dir, tracking_uri).attempt(deadline=deadline, over=True)
    except (OSError, TrackingError) as error:
        return out_of_sync(str(error))


class Sync:
    """Syncs one run, again and again while it lasts; a failure is a result, never an exception."""

    def __init__(self, run_dir: Path, tracking_uri: str | None = None) -> None:
        self.run_dir, self._given_uri = run_dir.absolute(), tracking_uri
        self._uri = ""  # the one in use
        self._run: MlflowRun | None = None  # None until MLflow has answered, and after a failure

    def attempt(self, *, deadline: float, over: bool) -> SyncResult:
        """Try once; `over`: no trainer is at work."""
        try:
            history = RunHistory.read(self.run_dir / RECORD_NAME)
            if history is None:
                failed = out_of_sync(f"{self.run_dir / RECORD_NAME} has no start of a run")
                return failed if over else SyncResult(True, "waiting for the run to start")
            return self._sync(history, deadline, over)
        except TrackingError as error:
            return out_of_sync(str(error))
        # MLflow lets through whatever SQLAlchemy, requests and the disk raise.
        except Exception as error:
            logger.debug("the sync failed", exc_info=True)
            self._run = None
            where = self._uri or str(self.run_dir / RECORD_NAME)
            return out_of_sync(f"{where}: {_root_cause(error)}")

    def _sync(self, history: RunHistory, deadline: float, over: bool) -> SyncResult:
        self._uri = absolute_uri(self._given_uri or recorded_uri(history, self.run_dir))
        database = database_file(self._uri)
        if database:
            database.parent.mkdir(parents=True, exist_ok=True)
            check_database(database)
        with _as_mlflow_reads(self._uri, database) as uri:
            run = self._run = self._run or MlflowRun.open(uri, database, history)
            run.deadline = deadline
            run.update(history, self.run_dir, over)
        if run.unseen:
            return out_of_sync(run.unseen)
        where = f"experiment {history.start['experiment']}, run {history.start['run_name']}"
        notes = f" ({'; '.join(run.notes)})" if run.notes else ""
        return SyncResult(True, f"MLflow is in sync: {where}{notes}")


def recorded_uri(history: RunHistory, run_dir: Path) -> str:
    """Return the tracking URI of the record; where its SQLite file is now, if the project moved.

    Raises:
        TrackingError: it cannot be used without --tracking_uri.
    """
    uri = history.tracking_uri
    if HIDDEN in uri:
        raise TrackingError(f"the record keeps no password; add --tracking_uri {uri} with it")
    database = database_file(uri)
    if database is None or history.run_dir == str(run_dir.resolve()):
        return uri
    if history.run_dir:
        way = os.path.relpath(database, history.run_dir)
        moved = Path(os.path.normpath(run_dir.resolve() / way))
        if moved.exists():
            return sqlite_uri(moved)
    if not database.parent.is_dir():
        raise TrackingError(
            f"the folder {database.parent} does not exist; name MLflow's database with "
            "--tracking_uri sqlite:///PATH"
        )
    return uri


@contextlib.contextmanager
def _as_mlflow_reads(uri: str, database: Path | None) -> Iterator[str]:
    """Give the URI that MLflow and every SQLAlchemy read alike, inside the context.

    SQLAlchemy decodes paths since 2.1, MLflow never does: a path that needs encoding is avoided by
    being in its folder.
    """
    if database is None or "%" not in uri:
        yield uri
    else:
        before = os.getcwd()
        os.chdir(database.parent)
        try:
            _, mark, options = uri.partition("?")
            yield f"sqlite:///{database.name}{mark}{options}"
        finally:
            os.chdir(before)


class MlflowRun:
    """One run as MLflow has it. Only this class talks to MLflow."""

    def __init__(self, client: Any, run: Any, *, database: Path | None) -> None:
        self.client, self.run_id = client, run.info.run_id
        self.notes: list[str] = []
        self.unseen = ""  # why the server cannot see the files
        self.deadline = math.inf
        self._artifacts = run.info.artifact_uri
        self._disk = local_folder(self._artifacts) if database is None else None
        running = run.info.status == "RUNNING"
        self._ended = (run.info.status, None if running else run.info.end_time)
        self._steps: dict[str, set[int]] = {}  # metric name to the steps that MLflow has

    @classmethod
    def open(cls, uri: str, database: Path | None, history: RunHistory) -> "MlflowRun":
        """Find the run by its tag, or create it, and log its settings."""
        client = _client(uri)
        moved_from = relocate_artifacts(database) if database else None
        experiment = _experiment(client, history.start["experiment"], database)
        run = _find_run(client, experiment, history) or _create_run(client, experiment, history)
        opened = cls(client, run, database=database)
        opened._log_settings(history, known=run.data.params)
        if moved_from:
            opened.notes.append(f"the project moved, and with it the artifacts of {moved_from}")
        folder = local_folder(experiment.artifact_location)
        if database and folder and not _is_same(folder, database.parent / ARTIFACTS_NAME):
            opened.notes.append(f"artifacts in {folder}")
        return opened

    def update(self, history: RunHistory, run_dir: Path, over: bool) -> None:
        """Store what is missing; `over`: without an end, the run was killed."""
        self._log_metrics(history.points())
        status = history.end["status"] if history.end else "KILLED" if over else "RUNNING"
        ended = (status, None if status == "RUNNING" else history.last_time)
        if history.end and (ended != self._ended or self._disk):
            self._log_files(history.end, run_dir)
        if ended == self._ended:
            return
        if status == "RUNNING":
            self.client.update_run(self.run_id, status=status)
        else:  # last of all: says that everything before is stored
            self.client.set_terminated(self.run_id, *ended)
        self._ended = ended

    def _log_settings(self, history: RunHistory, known: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        texts = {_name(key): str(value)[:6000] for key, value in history.params.items()}
        params = [Param(key, value) for key, value in texts.items() if key not in known]
        facts = history.system.items()
        tags = [RunTag(f"system.{_name(key)}"[:250], str(value)[:8000]) for key, value in facts]
        for i in range(0, max(len(params), len(tags)), 50):  # at most 100 of each, 1 MB together
            self.client.log_batch(self.run_id, params=params[i : i + 50], tags=tags[i : i + 50])

    def _log_metrics(self, points: list[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        new = []
        for name, value, time_ms, step in points:
            key = _name(name)
            if step not in self._stored_steps(key):
                self._steps[key].add(step)
                new.append(Metric(key, value, time_ms, step))
        for i in range(0, len(new), 500):  # MLflow takes at most 1,000
            self._check_deadline()
            self.client.log_batch(self.run_id, metrics=new[i : i + 500])

    def _stored_steps(self, key: str) -> set[int]:
        if key not in self._steps:
            history = self.client.get_metric_history(self.run_id, key)
            self._steps[key] = {metric.step for metric in history}
        return self._steps[key]

    def _log_files(self, end: dict[str, Any], run_dir: Path) -> None:
        """Upload the files; those of the model go to `model/`, the source of the version."""
        model = end["model"] or {"files": []}
        folders = {**dict.fromkeys(end["files"]), **dict.fromkeys(model["files"], "model")}
        missing = [file for file in folders if not (run_dir / file).is_file()]
        if missing:
            self.notes.append(f"skipped, not found: {', '.join(missing)}")
        paths = {run_dir / file: folders[file] for file in folders if file not in missing}
        if self._disk and paths:
            smallest = min(paths, key=lambda path: path.stat().st_size)
            self.unseen = self._why_unseen(self._disk, smallest, paths[smallest])
            if self.unseen:
                return
        for path, folder in paths.items():
            self._check_deadline()
            self.client.log_artifact(self.run_id, str(path), folder)
        if end["model"] and not {*model["files"]} & {*missing}:
            self._describe_onnx(end["model"])
            self._register(model["name"], str(model["version"]))

    def _why_unseen(self, disk: Path, file: Path, folder: str | None) -> str:
        """Store one file on the disk that the server names, and ask the server for it."""
        where = f"the server keeps artifacts in its folder {disk}"
        remedy = "start it with --serve-artifacts, or mount that folder on this machine"
        place = disk / (folder or "")
        new = [path for path in (place, *place.parents) if not path.exists()]
        try:
            self.client.log_artifact(self.run_id, str(file), folder)
        except OSError as error:
            return f"{where}, which cannot be written here ({_root_cause(error)}); {remedy}"
        if self._server_sees(file.name, folder):
            return ""
        (place / file.name).unlink()
        for path in new:
            path.rmdir()
        return f"{where}, which is another folder on this machine; {remedy}"

    def _server_sees(self, name: str, folder: str | None) -> bool:
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        creds = get_default_host_creds(self.client.tracking_uri)
        asked = {"run_id": self.run_id} | ({"path": folder} if folder else {})
        for pause in SHARED_DISK_PAUSES:
            time.sleep(pause)
            answer = http_request(creds, "/api/2.0/mlflow/artifacts/list", "GET", params=asked)
            found = [Path(file["path"]).name for file in answer.json().get("files", [])]
            if name in found:
                return True
        return False

    def _describe_onnx(self, model: dict[str, Any]) -> None:
        """Add MLflow's own description, by which it loads `models:/NAME/VERSION`.

        The model takes normalized images, float32 (N, 3, H, W).
        """
        plain = f"food_model_v{model['version']}.onnx"
        if plain not in [Path(file).name for file in model["files"]]:
            return
        import mlflow

        flavors = {
            "onnx": {"data": plain, "providers": PROVIDERS},
            "python_function": {"data": plain, "loader_module": "mlflow.onnx"},
        }
        about = {"run_id": self.run_id, "model_uuid": self.run_id, "artifact_path": "model"}
        facts = about | {"mlflow_version": mlflow.__version__, "flavors": flavors}
        self.client.log_text(self.run_id, json.dumps(facts, indent=1), "model/MLmodel")

    def _register(self, name: str, version: str) -> None:
        self._check_deadline()
        known = self.client.search_model_versions(f"run_id = '{self.run_id}'")
        if any(v.name == name and v.tags.get("food_model_version") == version for v in known):
            return
        _create_once(self.client.create_registered_model, name)
        note = f"food_model_v{version}: a plain state_dict with its description beside it."
        tags = {"food_model_version": version}
        source = f"{self._artifacts}/model"
        self.client.create_model_version(name, source, self.run_id, tags, description=note)

    def _check_deadline(self) -> None:
        if time.monotonic() > self.deadline:
            raise TimeoutError("there was not enough time")


def _client(uri: str) -> Any:
    for key, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise TrackingError(
            f"mlflow cannot be imported ({error}); install it with: pip install mlflow"
        ) from error
    if not uri.startswith("http"):
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = 1  # the mirror retries; 10 tries block for two minutes
    return MlflowClient(uri, uri)


def _experiment(client: Any, name: str, database: Path | None) -> Any:
    """Find or create it; a SQLite file gets its artifacts beside it, not in the current folder."""
    if client.get_experiment_by_name(name) is None:
        location = (database.parent / ARTIFACTS_NAME).as_uri() if database else None
        _create_once(client.create_experiment, name, artifact_location=location)
    return client.get_experiment_by_name(name)


def _find_run(client: Any, experiment: Any, history: RunHistory) -> Any:
    tagged = f"tags.`{RUN_TAG}` = '{history.start['run']}'"
    found = client.search_runs([experiment.experiment_id], tagged)
    return found[0] if found else None


def _create_run(client: Any, experiment: Any, history: RunHistory) -> Any:
    start = history.start
    tags = {RUN_TAG: start["run"], "mlflow.source.name": "train_model.py"}
    return client.create_run(experiment.experiment_id, start["time"], tags, start["run_name"])


def _create_once(create: Callable[..., object], name: str, **options: object) -> None:
    """Create what may be there already: another run may have got there first."""
    from mlflow.exceptions import MlflowException

    try:
        create(name, **options)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _name(name: str) -> str:
    """A name that MLflow takes: no path, none of the characters it refuses, at most 250."""
    return re.sub(r"[^\w.\- ]", "_", name).strip(". ")[:250] or "_"


def _is_same(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def _root_cause(error: BaseException) -> str:
    """The first line of what went wrong at the bottom: MLflow wraps it in a hundred lines."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        if isinstance(cause, LookupError):  # how MLflow finds out, not what is wrong
            break
        error = cause
    if isinstance(error, ModuleNotFoundError):
        return f"it needs the Python module {error.name}, which is not installed"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def only_one(run_dir: Path, give_up: Callable[[], bool]) -> Iterator[None]:
    """Hold the run's lock, which a dying process frees.

    Raises:
        TrackingError: another process has it, and `give_up` said so.
    """
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(file_lock(run_dir / LOCK_NAME, LOCK_POLL_SECONDS))
                break
            except Timeout as error:
                if give_up():
                    raise TrackingError("another process is syncing this run") from error
        yield
