"""Fixtures that several test files share."""

import logging
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from app.ml.artifacts import FORMAT_VERSION, Decision, ModelRecord, save_version
from app.ml.model import backbone, build_model, head_linear
from app.ml.preprocessing import PreprocessConfig

if TYPE_CHECKING:
    from tests.support.runs import Outcome

SHARED = Path(__file__).resolve().parents[2] / "shared"


def release_model(
    output_dir: Path,
    classes: list[str],
    model_name: str = "mobilenet_v2",
    seed: int = 0,
    decision: Decision | None = None,
) -> ModelRecord:
    """Release a network with random weights, as a run would release a trained one."""
    torch.manual_seed(seed)
    model = build_model(model_name, len(classes))
    num_features = head_linear(model, model_name).in_features
    centroids = torch.nn.functional.normalize(torch.rand(len(classes), num_features), dim=1)
    return save_version(
        output_dir,
        state=model.state_dict(),
        centroids=centroids,
        onnx=None,
        make_record=lambda version, sha256: ModelRecord(
            format_version=FORMAT_VERSION,
            version=version,
            model_name=model_name,
            class_to_idx={name: i for i, name in enumerate(classes)},
            preprocessing=PreprocessConfig(**backbone(model_name).preprocessing),
            decision=decision or Decision(temperature=1.0, confident_at=0.5, food_at=-1.0),
            sha256=sha256,
            metrics={"top1": 0.5},
            training={"epochs": 1},
            libraries={"torch": torch.__version__},
            created=datetime.now(timezone.utc).isoformat(),
        ),
        write_report=lambda _folder, _record: None,
        verify=lambda _folder: None,
    )


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one released model of three classes (random weights); do not change it."""
    folder = tmp_path_factory.mktemp("ml-models")
    release_model(folder, ["apple_pie", "samosa", "jalebi"])
    return folder


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real photos and weights beside the repository; skips without it."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the real photos beside the repository, which are not part of it")
    return SHARED


# Short trainings: what they need is imported where they are used -----------------------------


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes of 14 coloured pictures each: 27 to train on, 6 to validate with, 9 to test."""
    from tests.support.runs import draw_photos

    return draw_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> "Outcome":
    """What three epochs lead to when nothing happens."""
    from tests.support.runs import outcome
    from tests.support.short_runs import costs_said, one_thread, quick_release, train

    import train_model

    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch, one_thread(), costs_said():
        patch.setattr(train_model, "release_model", quick_release)
        assert train(folder, photos) == 0
    return outcome(folder)


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """On one thread, with a quick release, and with what the runs cost printed."""
    from tests.support.short_runs import costs_said, one_thread, quick_release

    import train_model

    monkeypatch.setattr(train_model, "release_model", quick_release)
    caplog.set_level(logging.INFO)
    with one_thread(), costs_said():
        yield
