"""The aliases in MLflow's registry follow the version that is current in a folder."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.released import release_model
from tests.support.tracked_runs import bring_in_sync

import train_model
from app.ml.artifacts import CLASS_MAP_NAME, CONFIG_NAME, make_current, read_record
from training.config import TrainingConfig
from training.data.splits import FoodData, Split
from training.run import mlflow_registry
from training.run.mlflow_registry import REGISTERED_NAME, register, set_aliases, version_tags
from training.run.record import recording_mean

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*"),
]


@pytest.fixture
def client(store: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(store, store)


def a_folder(path: Path, versions: int, seed: int = 0) -> Path:
    """Records as releases write them, without the networks; the last is current."""
    path.mkdir()
    for number in range(1, versions + 1):
        sha256 = {f"food_model_v{number}.pth": f"{seed}{number}" * 32}
        record = {"version": number, "sha256": sha256, "class_to_idx": {"dosa": 0, "idli": 1}}
        record |= {"model_name": "mobilenet_v2", "metrics": {"test_top1": 0.8125}}
        (path / f"food_model_v{number}.json").write_text(json.dumps(record))
    become_current(path, versions)
    return path


def become_current(folder: Path, number: int) -> None:
    shutil.copy(folder / f"food_model_v{number}.json", folder / CONFIG_NAME)


def registered(
    client: Any, folder: Path, number: int, tags: Mapping[str, str] | None = None
) -> None:
    """Register a version as its run would; `tags` replaces what it is described by."""
    run = client.create_run("0").info.run_id
    record = mlflow_registry.read_facts(folder / f"food_model_v{number}.json")
    assert record
    described = version_tags(record) if tags is None else dict(tags)
    for _ in range(2):  # the second time there is nothing to do
        register(client, REGISTERED_NAME, str(number), source="x", run_id=run, tags=described)


def aliases(client: Any) -> dict[str, str]:
    """Alias to the version's own number."""
    found = client.get_registered_model(REGISTERED_NAME).aliases
    versions = {a: client.get_model_version(REGISTERED_NAME, str(n)) for a, n in found.items()}
    return {alias: v.tags["food_model_version"] for alias, v in versions.items()}


def test_the_champion_is_current_and_the_challenger_is_newer(client: Any, tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "models", 4)
    for number in (1, 2, 3):
        registered(client, folder, number)
    steps: list[tuple[int, dict[str, str]]] = [
        (1, {"champion": "1", "challenger": "3"}),  # those after it were held back
        (2, {"champion": "2", "challenger": "3"}),
        (3, {"champion": "3"}),  # promoted
        (2, {"champion": "2", "challenger": "3"}),  # and back
        (4, {}),  # not registered: it was released without MLflow
        (3, {"champion": "3"}),
    ]
    for current, expected in steps:
        become_current(folder, current)
        for _ in range(2):
            said = set_aliases(client, REGISTERED_NAME, folder)
            assert aliases(client) == expected, current
        assert (f"v{current} is not in the registry" in said) == (current == 4)
    (first, *rest) = client.search_model_versions("tags.num_classes = '2'")
    assert len(rest) == 2 and first.tags["test_top1"] == "0.8125"


def test_another_folder_s_versions_of_the_same_number_are_told_apart(
    client: Any, tmp_path: Path
) -> None:
    ours, other = a_folder(tmp_path / "ours", 2), a_folder(tmp_path / "other", 2, seed=1)
    registered(client, ours, 1)
    registered(client, other, 1)
    become_current(ours, 1)
    set_aliases(client, REGISTERED_NAME, ours)
    before = client.get_registered_model(REGISTERED_NAME).aliases
    assert client.get_model_version_by_alias(REGISTERED_NAME, "champion").version == 1
    said = set_aliases(client, REGISTERED_NAME, other)  # its v2 is not registered
    assert "v2 is not in the registry" in said
    assert client.get_registered_model(REGISTERED_NAME).aliases == before
    become_current(other, 1)
    set_aliases(client, REGISTERED_NAME, other)
    assert client.get_model_version_by_alias(REGISTERED_NAME, "champion").version == 2


def test_versions_that_were_registered_without_a_checksum_count_too(
    client: Any, tmp_path: Path
) -> None:
    folder = a_folder(tmp_path / "models", 1)
    registered(client, folder, 1, tags={})
    set_aliases(client, REGISTERED_NAME, folder)
    assert aliases(client) == {"champion": "1"}


def test_a_mean_is_registered_and_names_its_parents(
    client: Any, store: str, tmp_path: Path
) -> None:
    """As the version of a run, by what syncs every run."""
    split = Split(("photos/dosa/1.jpg", "photos/idli/1.jpg"), np.array([0, 1]))
    audit = {"source": "class folders in photos", "skipped": []}
    data = FoodData({"dosa": 0, "idli": 1}, split, split, split, notes=[], audit=audit)
    models, run_dir = tmp_path / "models", tmp_path / "runs" / "average-v8-v9-1a2b"
    released = release_model(models, ["dosa", "idli"], parents=[8, 9])
    make_current(models, released)
    config = TrainingConfig(output_dir=models, checkpoint_dir=run_dir.parent, no_mlflow=True)
    with recording_mean(run_dir.name, config, data, torch.device("cpu")) as end:
        end.finish(released)
    for _ in range(2):  # the second time there is nothing to do
        bring_in_sync(run_dir, store)
    (registered,) = client.search_model_versions("tags.parents = 'v8, v9'")
    assert registered.name == REGISTERED_NAME and aliases(client) == {"champion": "1"}
    run = client.get_run(registered.run_id)
    assert (run.info.run_name, run.info.status) == (run_dir.name, "FINISHED")
    assert run.data.tags["food_model_version"] == registered.tags["food_model_version"] == "1"


def promote(folder: Path, version: int, *flags: str) -> int:
    return train_model.main(["--output_dir", str(folder), "--promote", f"v{version}", *flags])


def test_promote_moves_the_aliases_and_waits_for_no_dead_server(
    client: Any, store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "models"
    for seed in (0, 1):
        release_model(folder, ["dosa", "idli"], seed=seed)
        registered(client, folder, seed + 1)
    make_current(folder, read_record(folder, 1))
    dead = "http://127.0.0.1:9"
    assert promote(folder, 2, "--tracking_uri", dead) == 0
    assert f"MLflow is out of sync: {dead}" in caplog.text
    assert read_record(folder).version == 2
    assert promote(folder, 2, "--tracking_uri", store) == 0, "the same command catches up"
    assert "nutrilearn-food version 2 is the champion" in caplog.text
    assert promote(folder, 1, "--tracking_uri", store) == 0
    assert aliases(client) == {"champion": "1", "challenger": "2"}
    assert promote(folder, 2, "--tracking_uri", store, "--no_mlflow") == 0
    assert promote(folder, 2) == 0, "its run knew no MLflow"
    assert aliases(client) == {"champion": "1", "challenger": "2"}
    assert promote(folder, 2, "--tracking_uri", f"sqlite:///{tmp_path / 'gone.db'}") == 0
    assert "gone.db does not exist" in caplog.text and not (tmp_path / "gone.db").exists()
    assert {CLASS_MAP_NAME, CONFIG_NAME} <= {path.name for path in folder.iterdir()}
