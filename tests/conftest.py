"""Fixtures that several test files share."""

import logging
import multiprocessing
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.released import release_model

if TYPE_CHECKING:
    from tests.support.runs import Outcome

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def left_as_found() -> Iterator[None]:
    """No test leaves a process behind, or a backbone that only tests have."""
    before = set(multiprocessing.active_children())
    yield
    if model := sys.modules.get("app.ml.model"):
        model.BACKBONES.pop("standin", None)
    assert set(multiprocessing.active_children()) <= before


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
    from tests.support import standin
    from tests.support.short_runs import costs_said, one_thread, quick_release

    import train_model

    monkeypatch.setattr(train_model, "release_model", quick_release)
    caplog.set_level(logging.INFO)
    with standin.registered(), one_thread(), costs_said():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what is not UTF-8 in the output of a test: xdist could not send it on."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report
