"""The process that mirrors a run in MLflow while it trains, and the trainer's handle on it.

It is a process of its own because one call to a dead MLflow server blocks for minutes, a locked
database for 20 s, and asynchronous logging loses points at exit. The trainer never imports mlflow.
"""

import contextlib
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from training.errors import TrackingError
from training.run.history import RECORD_NAME
from training.run.mlflow_sync import Sync, SyncResult, only_one, out_of_sync
from training.shell import quoted
from training.uris import without_password

BACKEND = Path(__file__).resolve().parents[2]
LOG_NAME = "mlflow.log"
URI_VARIABLE = "MLFLOW_TRACKING_URI"  # not an argument: other users see those
# Without PYTHONPATH, which a colon in the path cuts, and without what is in the current folder.
START = "import sys; sys.path[:] = [sys.argv[1], *filter(None, sys.path)]; "
START += "from training.run.mlflow_mirror import mirror; mirror(sys.argv[2])"
CLOSE_SECONDS = 9.5  # what a trainer waits at the end for its mirror
FINAL_SECONDS = 60.0  # what the mirror allows itself once the trainer is gone
POLL_SECONDS = 0.5
RETRY_SECONDS = (15.0, 60.0)  # the first pause after a failure, doubled up to the last
IGNORED_SIGNALS = ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "XCPU", "BREAK")

logger = logging.getLogger(__name__)


class MlflowMirror:
    """The trainer's handle on the mirror process; `MlflowMirror()` mirrors nothing."""

    def __init__(self, run_dir: Path | None = None, tracking_uri: str = "") -> None:
        self._run_dir, self._uri = run_dir, tracking_uri
        self.process: subprocess.Popen[bytes] | None = None
        self._log_start = _size(run_dir / LOG_NAME) if run_dir else 0

    @classmethod
    def launch(cls, run_dir: Path, tracking_uri: str) -> "MlflowMirror":
        """Start the process that follows the record, out of reach of the terminal's Ctrl-C."""
        handle = cls(run_dir, tracking_uri)
        options: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            group, low = subprocess.CREATE_NEW_PROCESS_GROUP, subprocess.BELOW_NORMAL_PRIORITY_CLASS
            options = {"creationflags": group | low}
        command = [sys.executable, "-c", START, str(BACKEND), str(run_dir.resolve())]
        options["env"] = {**os.environ, URI_VARIABLE: tracking_uri}
        pipe = subprocess.PIPE
        try:
            with (run_dir / LOG_NAME).open("ab") as own_log:
                handle.process = subprocess.Popen(
                    command, stdin=pipe, stdout=pipe, stderr=own_log, **options
                )
        except OSError as error:
            logger.warning("cannot start the MLflow mirror (%s); continuing without it", error)
        return handle

    def close(self) -> str | None:
        """Say that the run is over, and return one line on where MLflow stands.

        A mirror that needs longer continues by itself for up to a minute, as does one whose trainer
        was killed.
        """
        if self._run_dir is None:
            return None
        line = self._last_answer()
        if "out of sync" not in line:
            return line
        command = sync_command(self._run_dir, self._uri)
        return f"{line}; {RECORD_NAME} is the record; to catch up, run: {command}"

    def _last_answer(self) -> str:
        if self.process is None:
            return out_of_sync("its process could not start").message
        try:
            # A byte, and not only the end of the pipe: forked data workers may hold the pipe open.
            answer, _ = self.process.communicate(b"\n", timeout=CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            late = f"not done after {CLOSE_SECONDS:g} s; it continues for up to a minute"
            return self._last_failure() or out_of_sync(late).message
        code = self.process.returncode
        died = out_of_sync(f"its process ended with code {code}; see {LOG_NAME}").message
        return answer.decode(errors="replace").strip() or died

    def _last_failure(self) -> str:
        """What the mirror logged last of this run, if that is a failure."""
        assert self._run_dir
        with contextlib.suppress(OSError), (self._run_dir / LOG_NAME).open("rb") as log:
            log.seek(self._log_start)
            said = re.findall(r"MLflow is .*", log.read().decode(errors="replace"))
            return said[-1] if said and "out of sync" in said[-1] else ""
        return ""


def sync_command(run_dir: Path, tracking_uri: str) -> str:
    """The command that syncs this run later, quoted for the shell of this system.

    A URI that has a password is named, as the record does not keep that.
    """
    is_script = Path(sys.argv[0]).name == "train_model.py"
    script = sys.argv[0] if is_script else "backend/train_model.py"
    words = ["python", script, "--sync_mlflow", str(run_dir)]
    if (shown := without_password(tracking_uri)) != tracking_uri:
        words += ["--tracking_uri", shown]
    return quoted(words)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # not there yet, or its disk is away for a while
        return 0


# The process ----------------------------------------------------------------------------------


def follow(run_dir: Path, tracking_uri: str) -> SyncResult:
    """Sync MLflow whenever the record has grown, until the trainer is done or gone."""
    gone = threading.Event()

    def listen() -> None:
        os.read(0, 1)
        gone.set()

    threading.Thread(target=listen, daemon=True).start()
    sync = Sync(run_dir, tracking_uri)
    mirrored, pause, next_try = 0, RETRY_SECONDS[0], 0.0
    with only_one(run_dir, gone.is_set):
        while not gone.wait(POLL_SECONDS):
            size = _size(run_dir / RECORD_NAME)
            if size == mirrored or time.monotonic() < next_try:
                continue
            result = sync.attempt(deadline=math.inf, over=False)
            logger.info(result.message)
            if result.in_sync:
                if not mirrored:
                    sync.prepare()
                mirrored, pause = size, RETRY_SECONDS[0]
            else:
                next_try = time.monotonic() + pause
                pause = min(2 * pause, RETRY_SECONDS[1])
        return sync.attempt(deadline=time.monotonic() + FINAL_SECONDS, over=True)


class NoPasswords(logging.Formatter):
    """Also hides the passwords in tracebacks and in what libraries log."""

    def format(self, record: logging.LogRecord) -> str:
        return without_password(super().format(record))


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(NoPasswords("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    logging.getLogger("training").setLevel(logging.DEBUG)


def mirror(run_dir: str) -> None:
    """Run the mirror process, set up so that it neither dies early nor is in the way."""
    for name in IGNORED_SIGNALS:
        if number := getattr(signal, f"SIG{name}", None):
            signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(10)
    _log_to_stderr()
    answer = os.dup(1)
    os.dup2(2, 1)  # what MLflow prints belongs in the log
    try:
        message = follow(Path(run_dir), os.environ[URI_VARIABLE]).message
    except (OSError, TrackingError) as error:
        message = out_of_sync(str(error)).message
    logger.info(message)
    with contextlib.suppress(BrokenPipeError):  # a trainer that was killed does not listen
        os.write(answer, message.encode())
