"""MLflow's SQLite file: what keeps it from being written, and where its artifacts are."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from training.config import REPOSITORY
from training.errors import TrackingError
from training.run.mlflow_store import (
    artifact_folder,
    check_database,
    local_folder,
    relocate_artifacts,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*"),
]


def execute(database: Path, *statements: str) -> list[tuple[str]]:
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        return [row for line in statements for row in connection.execute(line).fetchall()]


@pytest.mark.usefixtures("store")
def test_a_good_database_is_left_as_it_was(tmp_path: Path) -> None:
    before = execute(tmp_path / "mlflow.db", "SELECT name, sql FROM sqlite_master")
    check_database(tmp_path / "mlflow.db")
    assert execute(tmp_path / "mlflow.db", "SELECT name, sql FROM sqlite_master") == before


def test_a_new_database_is_allowed(tmp_path: Path) -> None:
    check_database(tmp_path / "new.db")
    (tmp_path / "empty.db").touch()
    check_database(tmp_path / "empty.db")


def damage(database: Path) -> None:
    database.write_bytes(database.read_bytes()[:200_000])


BROKEN: dict[str, Callable[[Path], object]] = {
    "is a folder": lambda path: (path.unlink(), path.mkdir()),
    "is not a SQLite database": lambda path: path.write_text("hello"),
    "is damaged": damage,
    "a newer MLflow wrote it": lambda path: execute(
        path, "UPDATE alembic_version SET version_num = 'ffffffffffff'"
    ),
    "unable to open": lambda path: shutil.rmtree(path.parent),
}


@pytest.mark.parametrize("cause", BROKEN)
def test_a_broken_database_is_told_at_once_by_its_cause(
    cause: str, template: Path, tmp_path: Path
) -> None:
    database = tmp_path / "project" / "mlflow.db"
    database.parent.mkdir()
    shutil.copy(template, database)
    BROKEN[cause](database)
    began = time.monotonic()
    with pytest.raises(TrackingError, match=cause) as caught:
        check_database(database)
    assert str(database) in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - began < 2


@pytest.mark.usefixtures("store")
def test_a_locked_database_is_told_before_a_trainer_stops_waiting(tmp_path: Path) -> None:
    began = time.monotonic()
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(TrackingError, match="another program has it locked"):
            check_database(tmp_path / "mlflow.db")
    assert time.monotonic() - began < 6
    check_database(tmp_path / "mlflow.db")


@pytest.fixture
def as_another_user() -> Callable[[str], str]:
    """Runs code as somebody whom permissions bind; returns what it prints."""
    drop = ["-dac_override,-dac_read_search,-fowner,-chown"]
    strip = ["setpriv", "--bounding-set", *drop, "--inh-caps", "-all"]
    prefix = strip if os.name != "nt" and os.geteuid() == 0 else []
    if prefix and not shutil.which("setpriv"):
        pytest.skip("needs setpriv to test permissions as root")

    def run(code: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "backend")}
        command = [*prefix, sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], None]]:
    changed: list[Path] = []

    def make(path: Path) -> None:
        path.chmod(0o555 if path.is_dir() else 0o444)
        changed.append(path)

    yield make
    for path in changed:
        path.chmod(0o755)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("what", ["mlflow.db", "", "new.db"])
def test_what_may_not_be_written_is_named(
    what: str,
    tmp_path: Path,
    as_another_user: Callable[[str], str],
    read_only: Callable[[Path], None],
) -> None:
    """The file, the folder it is in, the folder of a file that is not there yet."""
    refused = tmp_path if what == "new.db" else tmp_path / what
    read_only(refused)
    database = tmp_path / (what or "mlflow.db")
    said = as_another_user(
        "from pathlib import Path\n"
        "from training.errors import TrackingError\n"
        "from training.run.mlflow_store import check_database\n"
        f"try: check_database(Path({str(database)!r}))\n"
        "except TrackingError as error: print(error)"
    )
    assert said.strip() == f"{database}: {refused} is read-only for this user"


# Artifacts ------------------------------------------------------------------------------------


def location_of(database: Path) -> str:
    (row,) = execute(database, "SELECT artifact_location FROM experiments WHERE name = 'mine'")
    return row[0]


def add_experiment(database: Path, location: str) -> None:
    columns = "name, artifact_location, lifecycle_stage, workspace"
    execute(
        database,
        f"INSERT INTO experiments ({columns}) VALUES ('mine', '{location}', 'active', 'default')",
        "INSERT INTO runs (run_uuid, experiment_id, artifact_uri, lifecycle_stage, status) "
        f"SELECT 'r', experiment_id, '{location}/r/artifacts', 'active', 'FINISHED' "
        "FROM experiments WHERE name = 'mine'",
        "INSERT INTO registered_models (name, workspace) VALUES ('food', 'default')",
        "INSERT INTO model_versions (name, version, run_id, source, storage_location, workspace) "
        f"VALUES ('food', 1, 'r', '{location}/r/artifacts/model', '{location}x', 'default')",
    )


@pytest.mark.parametrize("name", ["here", "new % place", "what? now", "Grüße#1"])
def test_artifacts_move_with_the_project(name: str, template: Path, tmp_path: Path) -> None:
    project = tmp_path / name
    project.mkdir()
    shutil.copy(template, project / "mlflow.db")
    old = (tmp_path / "old place" / "mlartifacts").as_uri()
    add_experiment(project / "mlflow.db", old)
    assert relocate_artifacts(project / "mlflow.db") == tmp_path / "old place" / "mlartifacts"
    home = (project / "mlartifacts").as_uri()
    assert location_of(project / "mlflow.db") == home
    assert local_folder(home) == project / "mlartifacts"
    rows = execute(project / "mlflow.db", "SELECT artifact_uri FROM runs")
    rows += execute(project / "mlflow.db", "SELECT source FROM model_versions")
    assert rows == [(f"{home}/r/artifacts",), (f"{home}/r/artifacts/model",)]
    (other,) = execute(project / "mlflow.db", "SELECT storage_location FROM model_versions")
    assert other == (f"{old}x",), "another folder whose name begins alike"
    assert relocate_artifacts(project / "mlflow.db") is None, "the second time there is nothing"


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("location", ["s3://bucket/mlartifacts", "mlflow-artifacts:/1", "here"])
def test_artifacts_of_other_places_stay(location: str, tmp_path: Path) -> None:
    """A bucket, a server's, and a folder that is there: a copied project keeps the old one's."""
    if location == "here":
        (tmp_path / "other" / "mlartifacts").mkdir(parents=True)
        location = (tmp_path / "other" / "mlartifacts").as_uri()
    add_experiment(tmp_path / "mlflow.db", location)
    assert relocate_artifacts(tmp_path / "mlflow.db") is None
    assert location_of(tmp_path / "mlflow.db") == location


@pytest.mark.parametrize(
    ("uri", "folder"),
    [
        ("sqlite:///x.db", Path("/home/me/mlartifacts")),
        ("postgresql+psycopg2://host/db", REPOSITORY / "mlartifacts"),
        ("mysql://host/db", REPOSITORY / "mlartifacts"),
        ("http://host:5000", None),
        ("databricks", None),
    ],
)
def test_artifacts_of_a_database_go_to_the_project(uri: str, folder: Path | None) -> None:
    """Not to wherever the trainer was started; a server knows its own place."""
    database = Path("/home/me/x.db") if uri.startswith("sqlite") else None
    assert artifact_folder(uri, database) == folder


def test_a_new_database_has_no_artifacts(tmp_path: Path) -> None:
    assert relocate_artifacts(tmp_path / "new.db") is None
