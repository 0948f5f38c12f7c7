"""The process that keeps MLflow level with the record of a run.

Started by `tracking.MlflowMirror`; `sync` does the same for a run that is over. What is stored
already is asked of MLflow itself: the run is found by its tag, steps by the metric history,
versions by the run, and the end time is set last of all. Levelling twice, or after a crash at any
point, stores nothing twice. Registered versions get no alias: which one is the champion is for
people to say; the tag `food_model_version` tells which files a version is.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.run.record import NOT_METRICS, RECORD_NAME, behind, database_file, read_events

log = logging.getLogger(__name__)

LOCK_NAME = "mlflow.lock"
RUN_TAG = "nutrilearn.run"
POLL_SECONDS = 0.5
RETRY_SECONDS = (15.0, 60.0)  # the first pause after a failure, doubled up to the last
FINAL_SECONDS = 60.0  # what the mirror allows itself once the trainer is gone
MLFLOW_ENVIRONMENT = {  # defaults only: what the user has set stands
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the mirror retries; 7 retries block for 246 s
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True)
class SyncResult:
    """Whether MLflow holds all that the record says; `message` is one line for people."""

    level: bool
    message: str


def sync(run_dir: Path, *, deadline_seconds: float, tracking_uri: str | None = None) -> SyncResult:
    """Brings MLflow level with the record of a run that no trainer is working on; safe to repeat.

    A record without an end is that of a killed run. `tracking_uri` replaces the one in the record.
    The deadline is looked at between calls: a locked SQLite file can hold one for 20 s more.
    """
    deadline = time.monotonic() + deadline_seconds
    try:
        with _only_one(run_dir, lambda: time.monotonic() > deadline):
            return _Levelling(run_dir, tracking_uri).attempt(deadline=deadline, over=True)
    except OSError as error:
        return SyncResult(False, behind(run_dir, str(error)))


@dataclass
class _Story:
    """What the record says, over all starts of one run."""

    start: dict[str, Any]  # the first: the run's key, name and experiment
    tracking_uri: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    system: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None  # None while the run goes on, or when it was killed
    last_time: int = 0

    @classmethod
    def read(cls, path: Path) -> _Story | None:
        """None: the run has not started yet."""
        events = read_events(path)
        first = next((event for event in events if event["event"] == "start"), None)
        if first is None:
            return None
        story = cls(first)
        for event in events:
            story._add(event)
        return story

    def _add(self, event: dict[str, Any]) -> None:
        self.last_time = event["time"]
        if event["event"] == "epoch":
            self.epochs.append(event)
            return
        self.end = event if event["event"] == "end" else None
        if event["event"] == "start":
            self.tracking_uri, self.system = event["tracking_uri"], event["system"]
            self.params = {**event["params"], **self.params}  # MLflow refuses a second value

    def points(self) -> list[tuple[str, float, int, int]]:
        """Every metric as (name, value, ms, step); step: the epoch, or the last one at the end."""
        points = [
            (_name(key), float(value), epoch["time"], epoch["epoch"])
            for epoch in self.epochs
            for key, value in epoch.items()
            if key not in NOT_METRICS
        ]
        if self.end:
            step = max((epoch["epoch"] for epoch in self.epochs), default=0)
            final = self.end["metrics"].items()
            points += [(_name(key), float(value), self.end["time"], step) for key, value in final]
        return points


class _Levelling:
    """Brings one run in MLflow level with its record. Only this class speaks with MLflow."""

    def __init__(self, run_dir: Path, tracking_uri: str | None = None) -> None:
        self.run_dir = run_dir
        self.tracking_uri = tracking_uri
        self.uri = ""  # the one in use
        self.client: Any = None
        self.run_id = ""
        self.ended: tuple[str, int | None] = ("", None)  # status and end time that MLflow has
        self.stored: dict[str, set[int]] = {}  # metric name to the steps that MLflow has
        self.missing: list[str] = []
        self.deadline = math.inf

    def attempt(self, *, deadline: float, over: bool) -> SyncResult:
        """One try; `over`: no trainer is at work. A failure is a result, never an exception."""
        self.deadline = deadline
        try:
            story = _Story.read(self.run_dir / RECORD_NAME)
            if story is None:
                reason = f"{self.run_dir / RECORD_NAME} holds no start"
                return SyncResult(not over, behind(self.run_dir, reason))
            self._level(story, over)
        except ImportError as error:
            reason = f"mlflow cannot be imported ({error}); `pip install mlflow` brings it"
            return SyncResult(False, behind(self.run_dir, reason))
        # MLflow lets through whatever SQLAlchemy, requests and the disk raise.
        except Exception as error:
            log.debug("MLflow could not be brought level.", exc_info=True)
            self.client = None
            reason = f"{_without_password(self.uri) or RECORD_NAME}: {_root_cause(error)}"
            return SyncResult(False, behind(self.run_dir, reason))
        where = f"experiment {story.start['experiment']}, run {story.start['run_name']}"
        lost = f" (left out, not found: {', '.join(self.missing)})" if self.missing else ""
        return SyncResult(True, f"MLflow is level: {where}{lost}")

    def _level(self, story: _Story, over: bool) -> None:
        if self.client is None:
            self._open(story)
        self._log_metrics(story.points())
        status = story.end["status"] if story.end else "KILLED" if over else "RUNNING"
        ended = (status, story.last_time if status != "RUNNING" else None)
        if ended == self.ended:
            return
        if story.end:
            self._log_files(story.end)
        if status == "RUNNING":
            self.client.update_run(self.run_id, status=status)
        else:  # last of all: says that everything before is stored
            self.client.set_terminated(self.run_id, *ended)
        self.ended = ended

    def _open(self, story: _Story) -> None:
        """Finds the run by its tag or creates it, and logs parameters and system facts."""
        for key, value in MLFLOW_ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        self.uri = uri = self.tracking_uri or story.tracking_uri
        if database := database_file(uri):
            database.parent.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(uri, uri)
        experiment_id = _experiment_id(client, story.start["experiment"], uri)
        tag = {RUN_TAG: story.start["run"], "mlflow.source.name": "train_model.py"}
        found = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{tag[RUN_TAG]}'")
        run = found[0] if found else None
        if run is None:
            begun, name = story.start["time"], story.start["run_name"]
            run = client.create_run(experiment_id, begun, tag, name)
        self.run_id, self.stored = run.info.run_id, {}
        running = run.info.status == "RUNNING"
        self.ended = (run.info.status, None if running else run.info.end_time)
        new = {_name(key): str(value)[:6000] for key, value in story.params.items()}
        params = [Param(key, value) for key, value in new.items() if key not in run.data.params]
        tags = [RunTag(f"system.{_name(k)}"[:250], str(v)[:8000]) for k, v in story.system.items()]
        for i in range(0, max(len(params), len(tags)), 50):  # at most 100 of each, 1 MB together
            client.log_batch(self.run_id, params=params[i : i + 50], tags=tags[i : i + 50])
        self.client = client

    def _log_metrics(self, points: list[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        new = []
        for key, value, time_ms, step in points:
            if key not in self.stored:
                history = self.client.get_metric_history(self.run_id, key)
                self.stored[key] = {metric.step for metric in history}
            if step not in self.stored[key]:
                self.stored[key].add(step)
                new.append(Metric(key, value, time_ms, step))
        for i in range(0, len(new), 500):  # MLflow takes at most 1,000
            self._check_deadline()
            self.client.log_batch(self.run_id, metrics=new[i : i + 500])

    def _log_files(self, end: dict[str, Any]) -> None:
        """Uploads the files; those of the model go to `model/`, the source of the version."""
        model = end["model"] or {"files": []}
        folders = {**dict.fromkeys(end["files"]), **dict.fromkeys(model["files"], "model")}
        self.missing = [file for file in folders if not (self.run_dir / file).is_file()]
        for file, folder in folders.items():
            self._check_deadline()
            if file not in self.missing:
                self.client.log_artifact(self.run_id, str(self.run_dir / file), folder)
        if end["model"] and not {*model["files"]} & {*self.missing}:
            self._register(model["name"], str(model["version"]))

    def _register(self, name: str, version: str) -> None:
        self._check_deadline()
        known = self.client.search_model_versions(f"run_id = '{self.run_id}'")
        if any(v.name == name and v.tags.get("food_model_version") == version for v in known):
            return
        _create_once(self.client.create_registered_model, name)
        source = f"{self.client.get_run(self.run_id).info.artifact_uri}/model"
        note = f"food_model_v{version}: a plain state_dict with its description beside it."
        tags = {"food_model_version": version}
        self.client.create_model_version(name, source, self.run_id, tags, description=note)

    def _check_deadline(self) -> None:
        if time.monotonic() > self.deadline:
            raise TimeoutError("the time for it ran out")


def _name(name: str) -> str:
    """A name that MLflow takes: no path, none of the characters it refuses, at most 250."""
    return re.sub(r"[^\w.\- ]", "_", name).strip(". ")[:250] or "_"


def _create_once(create: Callable[..., object], name: str, **options: object) -> None:
    """Creates what may be there already: another run may have been quicker."""
    from mlflow.exceptions import MlflowException

    try:
        create(name, **options)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _experiment_id(client: Any, name: str, uri: str) -> str:
    """Finds or creates the experiment; a SQLite file gets its artifacts beside it, not in cwd."""
    if client.get_experiment_by_name(name) is None:
        database = database_file(uri)
        location = (database.parent / "mlartifacts").as_uri() if database else None
        _create_once(client.create_experiment, name, artifact_location=location)
    return str(client.get_experiment_by_name(name).experiment_id)


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)


def _root_cause(error: BaseException) -> str:
    """The first line of what went wrong at the bottom: MLflow wraps it in a hundred lines."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _only_one(run_dir: Path, give_up: Callable[[], bool]) -> Iterator[None]:
    """Holds the run's lock, which a dying process frees; TimeoutError once `give_up` says so."""
    with (run_dir / LOCK_NAME).open("ab") as file:
        while not _locked(file.fileno()):
            if give_up():
                raise TimeoutError("another process is bringing this run level")
            time.sleep(POLL_SECONDS / 2)
        yield


def _locked(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        log.warning("This disk cannot lock files (%s); keep to one process for each run.", error)
    return True


def _follow(run_dir: Path) -> SyncResult:
    """Levels MLflow whenever the record has grown, until the trainer is done or gone."""
    gone = threading.Event()

    def listen() -> None:
        os.read(0, 1)
        gone.set()

    threading.Thread(target=listen, daemon=True).start()
    record = run_dir / RECORD_NAME
    levelling = _Levelling(run_dir)
    mirrored, pause, next_try = 0, RETRY_SECONDS[0], 0.0
    with _only_one(run_dir, gone.is_set):
        while not gone.wait(POLL_SECONDS):
            size = record.stat().st_size if record.exists() else 0
            if size == mirrored or time.monotonic() < next_try:
                continue
            result = levelling.attempt(deadline=math.inf, over=False)
            log.info(result.message)
            if result.level:
                mirrored, pause = size, RETRY_SECONDS[0]
            else:
                next_try = time.monotonic() + pause
                pause = min(2 * pause, RETRY_SECONDS[1])
        return levelling.attempt(deadline=time.monotonic() + FINAL_SECONDS, over=True)


def _main(run_dir: Path) -> None:
    """The mirror process, set up so that it neither dies early nor is in the way."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(10)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    log.setLevel(logging.DEBUG)
    answer = os.dup(1)
    os.dup2(2, 1)  # what MLflow prints belongs in the log
    try:
        message = _follow(run_dir).message
    except TimeoutError as error:
        message = behind(run_dir, str(error))
    log.info(message)
    with contextlib.suppress(BrokenPipeError):  # a trainer that was killed does not listen
        os.write(answer, message.encode())


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
