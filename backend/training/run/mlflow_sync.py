"""Syncing MLflow with the record of a run, by the mirror process or by --sync_mlflow."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

from app.ml.durable import file_lock
from training.errors import TrackingError
from training.run.history import RECORD_NAME, RunHistory
from training.run.mlflow_package import warm_up
from training.run.mlflow_registry import CONFIG_NAME, REGISTERED_NAME, read_facts, set_aliases
from training.run.mlflow_run import MlflowRun, connect
from training.run.mlflow_store import check_database
from training.uris import HIDDEN, absolute_uri, database_file, sqlite_uri, without_password

LOCK_NAME = "mlflow.lock"
LOCK_POLL_SECONDS = 0.25

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

    def prepare(self) -> None:
        """Do in advance what the end of the run needs; a failure there is told there."""
        try:
            warm_up()
        except Exception:
            logger.debug("MLflow could not be prepared", exc_info=True)

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
        if run.without_files:
            return out_of_sync(run.without_files)
        where = f"experiment {history.start['experiment']}, run {history.start['run_name']}"
        notes = f" ({'; '.join(run.notes)})" if run.notes else ""
        return SyncResult(True, f"MLflow is in sync: {where}{notes}")


def sync_aliases(model_dir: Path, tracking_uri: str | None = None) -> SyncResult | None:
    """Let the aliases in MLflow's registry follow the current version of a folder.

    tracking_uri: replaces that of the run which made the version. None where MLflow was off.
    """
    training = (read_facts(model_dir / CONFIG_NAME) or {}).get("training", {})
    uri = tracking_uri or training.get("tracking_uri")
    if not uri or (training.get("no_mlflow") and not tracking_uri):
        return None
    try:
        return SyncResult(True, f"MLflow: {_set_aliases(model_dir, absolute_uri(uri))}")
    # As in `Sync.attempt`.
    except Exception as error:
        logger.debug("the aliases were not set", exc_info=True)
        return out_of_sync(f"{uri}: {_root_cause(error)}; the aliases are as they were")


def _set_aliases(model_dir: Path, uri: str) -> str:
    if HIDDEN in uri:
        raise TrackingError("its password is not kept; add --tracking_uri with it")
    database = database_file(uri)
    if database:
        if not database.exists():
            raise TrackingError(f"{database} does not exist; name the database with --tracking_uri")
        check_database(database)
    with _as_mlflow_reads(uri, database) as read:
        return set_aliases(connect(read), REGISTERED_NAME, model_dir)


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
