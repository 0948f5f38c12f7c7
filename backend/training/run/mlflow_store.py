"""The SQLite file that MLflow keeps runs in: whether it can be written, where its artifacts are."""

import contextlib
import importlib.util
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from training.errors import TrackingError

PROJECT = Path(__file__).resolve().parents[3]
ARTIFACTS_NAME = "mlartifacts"  # the folder beside the database
LOCK_SECONDS = 4.0  # less than a trainer waits for its mirror
CAUSES = {  # by what SQLite says
    "database is locked": "another program has it locked",
    "file is not a database": (
        "it is not a SQLite database; name another file with --tracking_uri"
    ),
    "database disk image is malformed": (
        "it is damaged; restore it, or move it away to begin a new one"
    ),
    "database or disk is full": "its disk is full",
}
STORED_LOCATIONS = (  # every column in which MLflow writes where artifacts are
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def check_database(database: Path) -> None:
    """Find out at once what MLflow takes two minutes to call "unable to open database file".

    Raises:
        TrackingError: the file cannot be written, with the cause.
    """
    if database.is_dir():
        raise TrackingError(f"{database}: it is a folder; name a file with --tracking_uri")
    try:
        revision = _try_to_write(database)
    except sqlite3.Error as error:
        raise TrackingError(f"{database}: {_cause(database, error)}") from error
    known = _known_revisions()
    if revision and known and revision not in known:
        raise TrackingError(
            f"{database}: a newer MLflow wrote it than the one installed; "
            "pip install --upgrade mlflow"
        )


@contextlib.contextmanager
def _connected(database: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(database, timeout=LOCK_SECONDS, isolation_level=None)
    with contextlib.closing(connection):
        yield connection


def _try_to_write(database: Path) -> str | None:
    """Write and roll back; return the revision of MLflow's schema, None for a new database."""
    with _connected(database) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("CREATE TABLE nutrilearn_write_test (x)")
        connection.execute("ROLLBACK")
        if not _columns(connection, "alembic_version"):
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return str(row[0]) if row else None


def _columns(connection: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}


def _cause(database: Path, error: sqlite3.Error) -> str:
    """SQLite does not say which file it may not write, nor why."""
    if cause := CAUSES.get(str(error)):
        return cause
    for path in (database, database.parent):
        if path.exists() and not os.access(path, os.W_OK):
            return f"{path} is read-only for this user"
    return str(error)


def _known_revisions() -> set[str]:
    """The schema revisions that the installed MLflow can read: its files are named after them.

    None without an installed MLflow, which is told later.
    """
    package = importlib.util.find_spec("mlflow")
    places = (package.submodule_search_locations if package else None) or []
    files = (Path(p, "store", "db_migrations", "versions").glob("*_*.py") for p in places)
    return {file.name.split("_")[0] for folder in files for file in folder}


def artifact_folder(uri: str, database: Path | None) -> Path | None:
    """Return where the artifacts of a database go; a server decides that by itself: None."""
    if database:
        return database.parent / ARTIFACTS_NAME
    is_database = re.match(r"(postgresql|mysql|mssql)\b", uri)
    return PROJECT / ARTIFACTS_NAME if is_database else None


def local_folder(location: str | None) -> Path | None:
    """Return the folder of a `file:` URI or a plain path; None for any other artifact location."""
    parts = urlsplit(location or "")
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return Path(location) if location and not parts.scheme else None


def relocate_artifacts(database: Path) -> Path | None:
    """Tell MLflow where its artifacts are now, if the project was moved; return where they were.

    MLflow stores absolute locations, has no call to change them, and would make the old folder
    anew. A location that still exists is left as it is.
    """
    home = (database.parent / ARTIFACTS_NAME).as_uri()
    with _connected(database) as connection:
        if not _columns(connection, "experiments"):
            return None
        rows = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        old = {location: local_folder(location) for (location,) in rows if location != home}
        gone = {
            location: folder
            for location, folder in old.items()
            if folder and folder.name == ARTIFACTS_NAME and not folder.exists()
        }
        for location in gone:
            _replace_location(connection, location, home)
    return next(iter(gone.values()), None)


def _replace_location(connection: sqlite3.Connection, old: str, new: str) -> None:
    connection.execute("BEGIN IMMEDIATE")
    for table, column in STORED_LOCATIONS:
        if column in _columns(connection, table):
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
            )
    connection.execute("COMMIT")
