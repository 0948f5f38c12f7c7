"""MLflow stores; their tables take MLflow seconds, so they are made once and copied."""

import shutil
import sqlite3
from pathlib import Path

import pytest
from tests.support.tracked_runs import bring_in_sync, finished_run


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an empty store."""
    folder = tmp_path_factory.mktemp("template")
    finished_run(folder / "run", f"sqlite:///{folder / 'mlflow.db'}")
    bring_in_sync(folder / "run")
    with sqlite3.connect(folder / "mlflow.db") as database:
        for table in ("tags", "params", "metrics", "latest_metrics", "runs", "experiment_tags"):
            database.execute(f"DELETE FROM {table}")
        database.execute("DELETE FROM experiments WHERE name = 'tests'")
    database.close()
    return folder / "mlflow.db"


@pytest.fixture
def store(template: Path, tmp_path: Path) -> str:
    """The URI of a store of one's own."""
    shutil.copy(template, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"
