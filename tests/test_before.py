"""What the version before left behind still works: a model, an unfinished run, an MLflow store.

`support/before/before.tar.xz` was made with commit 05e1ea0, on the photos of `draw_photos`: a
mobilenet_v2 whose weights repeat a short pattern, so that they compress, with all layers frozen; a
released run, one that SIGTERM stopped in its third epoch, and the SQLite file that had both. The
pictures of the report were left out. `answers.json` is what its predictor answered.
"""

import functools
import json
import logging
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from tests.support import standin
from tests.support.pictures import resized_by_pillow
from tests.support.runs import arguments, draw_photos
from tests.support.tracked_runs import bring_in_sync, finished_run, the_run

import train_model
from app.main import create_app
from app.ml.artifacts import list_versions, read_record
from app.ml.predictor import load_model_for_inference, predict_image
from app.settings import Settings
from training.errors import CheckpointError
from training.run.checkpoints import load_checkpoint

BEFORE = Path(__file__).parent / "support" / "before"
ANSWERS = json.loads((BEFORE / "answers.json").read_text())
COLORS = {"green": (60, 170, 60), "red": (190, 60, 60), "sky": (70, 90, 200)}
EXPERIMENT = "nutrilearn-food-training"
RESIZED = 5e-3  # in a probability: Pillow resized then, and rounds some pixels otherwise than torch


@pytest.fixture(autouse=True)
def small_backbone() -> None:
    standin.register()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(BEFORE / "before.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def project(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to write in, as the current folder: the paths in it are relative."""
    folder = shutil.copytree(unpacked, tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder


def unfinished(folder: Path) -> Path:
    (checkpoint,) = folder.glob("checkpoints/*/checkpoint-000003.pt")
    return checkpoint


def picture(color: tuple[int, int, int]) -> Image.Image:
    rows, columns = np.mgrid[0:240, 0:320]
    waves = [
        (columns * 7 + rows * 3) % 97,
        (columns * 5 + rows * 11) % 89,
        (columns + rows) % 101,
    ]
    return Image.fromarray((np.array(color) / 2 + np.stack(waves, axis=2)).astype(np.uint8))


# The model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_the_model_answers_what_it_answered(runtime: Any, unpacked: Path) -> None:
    model = load_model_for_inference(unpacked / "ml-models", runtime=runtime)
    then = ANSWERS[runtime]
    pixels = (torch.arange(3 * 224 * 224) * 37 % 251).to(torch.uint8).reshape(1, 3, 224, 224)
    assert model.logits(pixels)[0].tolist() == pytest.approx(then["logits"], abs=2e-4)
    for name, color in COLORS.items():
        wanted = [(label, pytest.approx(p, abs=2e-4)) for label, p in then[name]["top"]]
        pixels = resized_by_pillow(picture(color), model.record.preprocessing)
        assert model.predict_batch(pixels[None])[0].top == wanted
        wanted = [(label, pytest.approx(p, abs=RESIZED)) for label, p in then[name]["top"]]
        assert predict_image(model, picture(color), top_k=3) == wanted
        assert model.predict(picture(color)).verdict == then[name]["verdict"]


def test_the_model_is_listed_and_served(unpacked: Path, tmp_path: Path) -> None:
    assert list_versions(unpacked / "ml-models") == [1]
    assert read_record(unpacked / "ml-models").classes == ["green", "red", "sky"]
    picture(COLORS["red"]).save(tmp_path / "red.png")
    with TestClient(create_app(Settings(model_dir=unpacked / "ml-models"))) as client:
        assert client.get("/ready").status_code == 200
        photo = {"file": ("red.png", (tmp_path / "red.png").read_bytes())}
        answer = client.post("/api/v1/predict", files=photo).json()
    assert answer["model_version"] == 1
    top = [(guess["class_name"], guess["confidence"]) for guess in answer["top_predictions"]]
    assert top == [
        (label, pytest.approx(p, abs=RESIZED)) for label, p in ANSWERS["onnx"]["red"]["top"]
    ]


# The unfinished run, and the next version -----------------------------------------------------


def test_a_checkpoint_is_read_or_refused_with_the_way_out(unpacked: Path) -> None:
    path = unfinished(unpacked)
    try:
        assert load_checkpoint(path).state["epoch"] == 2
    except CheckpointError as error:
        assert str(path) in str(error) and "start a new one" in str(error)
        assert "\n" not in str(error)


@pytest.mark.slow
def test_a_new_run_says_what_it_cannot_resume_and_is_released_beside_the_old_version(
    project: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    photos = draw_photos(Path("photos"))
    flags = ["--output_dir", "ml-models", "--checkpoint_dir", "checkpoints"]
    more = [*flags, "--epochs", "1", "--resume", "auto"]
    assert train_model.main(arguments(photos, Path("unused"), *more)) == 0
    name = unfinished(project).relative_to(project)
    assert any("skipped" in line and str(name) in line for line in caplog.messages)
    assert any("starting a new run" in line for line in caplog.messages)
    assert list_versions(project / "ml-models") == [1, 2]
    assert read_record(project / "ml-models").version == 2
    assert load_model_for_inference(project / "ml-models", 1).record.model_name == "mobilenet_v2"
    answers = project / "ml-models" / "food_model_v2" / "test_predictions.csv"
    answers.write_text(answers.read_text().replace(str(project), "/example"))  # where it stood
    assert train_model.main(["--compare", "v1", "v2", *flags]) == 0
    assert "9 images" in capsys.readouterr().out


# MLflow ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*")
def test_the_mlflow_store_takes_new_runs_and_shows_the_old_ones(
    project: Path, request: pytest.FixtureRequest
) -> None:
    """It stood at /example, which is not here any more, and moves in with its artifacts."""
    import mlflow

    store = f"sqlite:///{project / 'mlflow.db'}"
    finished_run(project / "checkpoints" / "new", store, files={"a.pth": "weights"})
    assert "/example/mlartifacts" in bring_in_sync(project / "checkpoints" / "new")
    for record in project.glob("checkpoints/mobilenet*/metrics.jsonl"):
        bring_in_sync(record.parent, store)
    request.addfinalizer(functools.partial(mlflow.set_tracking_uri, mlflow.get_tracking_uri()))
    mlflow.set_tracking_uri(store)
    runs = mlflow.search_runs(experiment_names=[EXPERIMENT, "tests"], output_format="list")
    assert sorted(run.info.status for run in runs) == ["FINISHED", "FINISHED", "KILLED"]
    home = (project / "mlartifacts").as_uri()
    assert all(run.info.artifact_uri.startswith(home) for run in runs)
    (released,) = (run for run in runs if "test_images" in run.data.metrics)
    client = mlflow.MlflowClient(store)
    points = client.get_metric_history(released.info.run_id, "val_loss")
    assert [point.step for point in points] == list(range(1, 61)), "synced again, stored once"
    assert the_run(store, project / "checkpoints" / "new").data.metrics["test_top1"] == 0.8
