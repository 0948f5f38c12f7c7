"""The record of a run, and its mirror in MLflow.

`metrics.jsonl` in the run folder is the record: one JSON object a line, appended and synced to
disk, times in milliseconds since 1970. MLflow is its mirror, kept by a process of its own that
follows the record: one call to a dead MLflow server blocks for minutes, a locked database for 20 s,
and asynchronous logging loses points at exit. The trainer never imports mlflow, and nothing that
MLflow does can stop, slow or break a run. `mlflow_mirror.sync` brings MLflow level later.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

RECORD_NAME = "metrics.jsonl"
LOG_NAME = "mlflow.log"
BACKEND = Path(__file__).resolve().parents[2]
NOT_METRICS = {"event", "time", "epoch"}


class RunRecord:
    """Appends to `metrics.jsonl`; `RunRecord(None)` keeps nothing (ranks above 0, dry runs).

    A disk that cannot be written does not stop the run: lines wait in memory for the next write,
    and after a crash `resumed` completes them from the checkpoint.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self._path = run_dir / RECORD_NAME if run_dir else None
        self._unwritten: list[bytes] = []
        self._failing = False
        self._length: int | None = None  # bytes of whole lines in the file
        self._repair = False
        events: list[dict[str, Any]] = []
        if self._path:
            try:
                events = read_events(self._path)
            except OSError as error:
                log.warning(
                    "%s cannot be read (%s); new lines are appended to it.", self._path, error
                )
        self._epochs = {event["epoch"] for event in events if event["event"] == "epoch"}
        self._key = next((e["run"] for e in events if e["event"] == "start"), uuid.uuid4().hex)

    def start(
        self,
        *,
        run_name: str,
        experiment: str,
        tracking_uri: str,
        params: dict[str, object],
        system: dict[str, object],
    ) -> None:
        """Notes one start of the trainer; a resumed run has several."""
        database = database_file(tracking_uri)  # absolute, so that it is found from every folder
        self._append(
            "start",
            run=self._key,
            run_name=run_name,
            experiment=experiment,
            tracking_uri=f"sqlite:///{database.as_posix()}" if database else tracking_uri,
            params=_plain(params),
            system=_plain(system),
        )

    def resumed(self, *, epoch: int, batch: int, history: list[dict[str, Any]]) -> None:
        """Notes where the run goes on; appends the epochs of `history` that the file misses."""
        self._append("resumed", epoch=epoch, batch=batch)
        for metrics in history:
            self.epoch(metrics)

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Appends one epoch (`epoch` counts from 1); one that is there already stays as it is."""
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
        files: list[str],
        model: dict[str, Any] | None,
    ) -> None:
        """Notes the end.

        `status` is FINISHED, FAILED or KILLED; `metrics` have names that no epoch uses; `files` are
        absolute or relative to the run folder; `model` is {"name", "version", "files"}.
        """
        if model:
            model = {**model, "files": [str(file) for file in model["files"]]}
        numbers = _plain({key: float(value) for key, value in metrics.items()})
        self._append("end", status=status, metrics=numbers, files=[*map(str, files)], model=model)

    def _append(self, event: str, **facts: object) -> None:
        if self._path is None:
            return
        line = json.dumps({"event": event, "time": int(time.time() * 1000), **facts})
        self._unwritten.append(line.encode() + b"\n")
        try:
            self._write(self._path, b"".join(self._unwritten))
        except OSError as error:
            if not self._failing or event == "end":
                log.warning(
                    "%s cannot be written (%s); its lines wait in memory.", self._path, error
                )
            self._failing = True
            return
        if self._failing:
            log.warning("%s is written again; no line was lost.", self._path)
        self._failing = False
        self._unwritten.clear()

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
            os.fsync(file.fileno())
        self._length += len(lines)
        self._repair = False


class MlflowMirror:
    """The trainer's handle on the mirror process; `MlflowMirror()` mirrors nothing."""

    def __init__(self, run_dir: Path | None = None, process: subprocess.Popen[bytes] | None = None):
        self._run_dir = run_dir
        self.process = process

    @classmethod
    def launch(cls, run_dir: Path) -> MlflowMirror:
        """Starts the process that follows the record, out of reach of the terminal's Ctrl-C."""
        options: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            group, low = subprocess.CREATE_NEW_PROCESS_GROUP, subprocess.BELOW_NORMAL_PRIORITY_CLASS
            options = {"creationflags": group | low}
        # A module, not a file: training/run must not become the first entry of sys.path.
        command = [sys.executable, "-m", "training.run.mlflow_mirror", str(run_dir.resolve())]
        path = os.pathsep.join(filter(None, [str(BACKEND), os.environ.get("PYTHONPATH")]))
        options["env"] = {**os.environ, "PYTHONPATH": path}
        pipe = subprocess.PIPE
        try:
            with (run_dir / LOG_NAME).open("ab") as own_log:
                process = subprocess.Popen(
                    command, stdin=pipe, stdout=pipe, stderr=own_log, **options
                )
        except OSError as error:
            log.warning("The MLflow mirror cannot start (%s); training goes on without it.", error)
            return cls(run_dir)
        return cls(run_dir, process)

    def close(self, timeout: float = 9.5) -> str | None:
        """Says that the run is over and returns one line on where MLflow stands.

        A mirror that needs more than `timeout` seconds goes on by itself for up to a minute, as
        does one whose trainer was killed.
        """
        if self._run_dir is None:
            return None
        if self.process is None:
            return behind(self._run_dir, "its process could not start")
        try:
            # A byte, and not only the end of the pipe: forked data workers may hold the pipe open.
            answer, _ = self.process.communicate(b"\n", timeout=timeout)
        except subprocess.TimeoutExpired:
            return behind(self._run_dir, f"it was not done within {timeout:g} s")
        code = self.process.returncode
        died = behind(self._run_dir, f"its process ended with code {code}, see {LOG_NAME}")
        return answer.decode(errors="replace").strip() or died


def read_events(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a record; half a line at its end does not count, damage is named."""
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(json.loads(line))
        except ValueError:
            log.warning("Line %d of %s is not JSON; it was left out.", number, path)
    return events


def _plain(facts: Mapping[str, object]) -> dict[str, object]:
    """Values that every JSON reader knows; the others (paths, lists, nan) as their text."""

    def is_plain(value: object) -> bool:
        finite = not isinstance(value, float) or math.isfinite(value)
        return finite and (value is None or isinstance(value, (bool, int, float, str)))

    return {key: value if is_plain(value) else str(value) for key, value in facts.items()}


def database_file(uri: str) -> Path | None:
    """The file of a SQLite URI, absolute; None for any other store."""
    scheme, _, path = uri.partition(":///")
    return Path(path).absolute() if scheme == "sqlite" else None


def behind(run_dir: Path, reason: str) -> str:
    """The line that says why MLflow lacks something, and what brings it level."""
    command = f'python backend/train_model.py --sync_mlflow "{run_dir}"'
    return (
        f"MLflow is behind: {reason.rstrip('.')}. "
        f"{RECORD_NAME} is the record; to catch up run `{command}`"
    )
