"""One run as MLflow holds it: found or created, and brought up to what its record says.

What is stored already is asked of MLflow itself: the run is found by its tag, steps by the metric
history, versions by the run, and the end time is set last. Storing twice, or after a crash at any
point, stores nothing twice.
"""

import contextlib
import json
import math
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from training.errors import TrackingError
from training.run.history import RunHistory
from training.run.mlflow_package import write_package
from training.run.mlflow_registry import (
    VERSION_TAG,
    create_once,
    read_facts,
    register,
    set_aliases,
    version_tags,
)
from training.run.mlflow_store import artifact_folder, local_folder, relocate_artifacts
from training.uris import database_file

RUN_TAG = "nutrilearn.run"
DATA_TAGS = {"name": "dataset", "digest": "dataset_digest", "classes": "num_classes"}
FACT_TAGS = {"git_commit": "mlflow.source.git.commit", "git_dirty": "mlflow.source.git.dirty"}
SHARED_DISK_PAUSES = (0.0, 1.0, 3.0)  # seconds; such a disk may show new files late
MLFLOW_ENVIRONMENT = {  # defaults only: what the user has set stands
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the mirror retries; 7 retries block for 246 s
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_UV_AUTO_DETECT": "false",  # it copies a project of the current folder into the model
}


class MlflowRun:
    """One run in MLflow."""

    def __init__(self, client: Any, run: Any) -> None:
        self.client, self.run_id = client, run.info.run_id
        self.notes: list[str] = []
        self.without_files = ""  # why MLflow cannot have the files
        self.deadline = math.inf
        self._artifacts = run.info.artifact_uri
        running = run.info.status == "RUNNING"
        self._ended = (run.info.status, None if running else run.info.end_time)
        self._steps: dict[str, set[int]] = {}  # metric name to the steps that MLflow has

    @classmethod
    def open(cls, uri: str, database: Path | None, history: RunHistory) -> "MlflowRun":
        """Find the run by its tag, or create it, and log its settings.

        uri, database: one SQLite file may have several URIs.
        """
        client = connect(uri)
        moved_from = relocate_artifacts(database) if database else None
        home = artifact_folder(uri, database)
        experiment = _experiment(client, history.start["experiment"], home)
        run = _find_run(client, experiment, history) or _create_run(client, experiment, history)
        opened = cls(client, run)
        opened._log_settings(history, known=run.data.params)
        opened._log_data(history.data, known=run.inputs)
        if moved_from:
            opened.notes.append(f"the project moved, and with it the artifacts of {moved_from}")
        folder = local_folder(experiment.artifact_location)
        if home and folder and not (database and _is_same(folder, home)):
            opened.notes.append(f"artifacts in {folder}")
        return opened

    def update(self, history: RunHistory, run_dir: Path, over: bool) -> None:
        """Store what is missing; `over`: without an end, the run was killed."""
        self._log_metrics(history.points())
        status = history.end["status"] if history.end else "KILLED" if over else "RUNNING"
        ended = (status, None if status == "RUNNING" else history.last_time)
        if history.end and (ended != self._ended or self._may_lack_files()):
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
        named = {FACT_TAGS.get(k, f"system.{_name(k)}"): v for k, v in history.system.items()}
        named |= {name: texts[name] for name in ("model_name", "weights") if name in texts}
        named |= {tag: history.data[key] for key, tag in DATA_TAGS.items() if key in history.data}
        tags = [RunTag(key[:250], str(value)[:8000]) for key, value in named.items()]
        for i in range(0, max(len(params), len(tags)), 50):  # at most 100 of each, 1 MB together
            self.client.log_batch(self.run_id, params=params[i : i + 50], tags=tags[i : i + 50])

    def _log_data(self, data: dict[str, Any], known: Any) -> None:
        """Log what the run trains on as a data set of MLflow's."""
        if not data or (known and known.dataset_inputs):
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        kept = ("name", "digest", "source")
        counts = {"num_rows": sum(data[split] for split in ("train", "val", "test"))}
        counts |= {key: value for key, value in data.items() if key not in kept}
        columns = [{"name": name, "type": "string", "required": True} for name in ("image", "dish")]
        dataset = Dataset(
            name=data["name"][:500],
            digest=data["digest"],
            source_type="local",
            source=json.dumps({"uri": data["source"]}),
            schema=json.dumps({"mlflow_colspec": columns}),
            profile=json.dumps(counts),
        )
        context = InputTag("mlflow.data.context", "training")
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [context])])

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
        self.without_files = self._why_without_files(paths)
        if self.without_files:
            return
        for path, folder in paths.items():
            self._check_deadline()
            self.client.log_artifact(self.run_id, str(path), folder)
        if end["model"] and not {*model["files"]} & {*missing}:
            self._register(end["model"], run_dir)

    def _may_lack_files(self) -> bool:
        """Whether the run may have ended in MLflow without its files."""
        return bool(self._server_disk()) or self._is_served_elsewhere()

    def _server_disk(self) -> Path | None:
        """The folder of its own machine that a server without --serve-artifacts names."""
        is_server = self.client.tracking_uri.startswith("http")
        return local_folder(self._artifacts) if is_server else None

    def _is_served_elsewhere(self) -> bool:
        is_database = database_file(self.client.tracking_uri) is not None
        return is_database and self._artifacts.startswith("mlflow-artifacts:")

    def _why_without_files(self, paths: dict[Path, str | None]) -> str:
        if self._is_served_elsewhere():
            return (
                "a server made this experiment and keeps its artifacts; give its address with "
                "--tracking_uri http://HOST:PORT, or another --experiment_name"
            )
        disk = self._server_disk()
        if not disk or not paths:
            return ""
        smallest = min(paths, key=lambda path: path.stat().st_size)
        return self._why_unseen(disk, smallest, paths[smallest])

    def _why_unseen(self, disk: Path, file: Path, folder: str | None) -> str:
        """Store one file on the disk that the server names, and ask the server for it."""
        where = f"the server keeps artifacts in its folder {disk}"
        remedy = "start it with --serve-artifacts, or mount that folder on this machine"
        stored = disk / (folder or "") / file.name
        was_there = stored.exists()
        new_folders = [path for path in stored.parents if not path.exists()]
        try:
            self.client.log_artifact(self.run_id, str(file), folder)
        except OSError as error:
            return f"{where}, which cannot be written here ({error.strerror}); {remedy}"
        if self._server_sees(file.name, folder):
            return ""
        with contextlib.suppress(OSError):  # somebody else's files may be there by now
            if not was_there:
                stored.unlink()
            for path in new_folders:
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

    def _register(self, model: dict[str, Any], run_dir: Path) -> None:
        """Register the version as a model of MLflow's, and let the aliases follow."""
        name, version = model["name"], str(model["version"])
        of_record = [f for f in model["files"] if Path(f).name == f"food_model_v{version}.json"]
        record = read_facts(run_dir / of_record[0]) if of_record else None
        if record:
            self._log_package(record)
        elif of_record:
            self.notes.append(f"v{version} is stored as plain files: its record cannot be read")
        self._check_deadline()
        tags = version_tags(record) if record else {}
        source = f"{self._artifacts}/model"
        register(self.client, name, version, source=source, run_id=self.run_id, tags=tags)
        self.client.set_tag(self.run_id, VERSION_TAG, version)
        if record:
            set_aliases(self.client, name, (run_dir / of_record[0]).parent)

    def _log_package(self, record: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "model")
            write_package(folder, record, self.run_id)
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                self._check_deadline()
                place = path.parent.relative_to(scratch).as_posix()
                self.client.log_artifact(self.run_id, str(path), place)

    def _check_deadline(self) -> None:
        if time.monotonic() > self.deadline:
            raise TimeoutError("there was not enough time")


def connect(uri: str) -> Any:
    """Make a client that fails soon: who calls it tries again, or says so."""
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


def _experiment(client: Any, name: str, home: Path | None) -> Any:
    """Find or create it. home: where its artifacts go, which MLflow would put where it stands."""
    if client.get_experiment_by_name(name) is None:
        location = home.as_uri() if home else None
        create_once(client.create_experiment, name, artifact_location=location)
    return client.get_experiment_by_name(name)


def _find_run(client: Any, experiment: Any, history: RunHistory) -> Any:
    tagged = f"tags.`{RUN_TAG}` = '{history.start['run']}'"
    found = client.search_runs([experiment.experiment_id], tagged)
    return found[0] if found else None


def _create_run(client: Any, experiment: Any, history: RunHistory) -> Any:
    start = history.start
    tags = {RUN_TAG: start["run"], "mlflow.source.name": "train_model.py"}
    return client.create_run(experiment.experiment_id, start["time"], tags, start["run_name"])


def _name(name: str) -> str:
    """A name that MLflow takes: no path, none of the characters it refuses, at most 250."""
    return re.sub(r"[^\w.\- ]", "_", name).strip(". ")[:250] or "_"


def _is_same(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))
