"""Several versions made one: which ones, from which photos, what is refused, and resumed runs."""

import dataclasses
import json
import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import standin
from tests.support.runs import arguments
from tests.support.short_runs import after, send
from torch import Tensor

import train_model
from app.ml.artifacts import ArtifactError, list_versions, read_record, read_state
from app.ml.model import build_model
from training.commands import average
from training.commands.average import (
    check_alike,
    greedy_soup,
    mean_of,
    photos_of,
    settings_of_mean,
)
from training.config import TrainingConfig
from training.data.manifest import MANIFEST_NAME, read_manifest
from training.run.history import RECORD_NAME, read_events

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_backbone() -> None:
    standin.register()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both runs start from."""
    standin.register()
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "start.pth"
    torch.save(build_model(standin.NAME, 3).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory, photos: Path, weights: Path) -> Path:
    """Versions 1 and 2 of `--runs 2`, whose mean is refused; do not change the folder."""
    standin.register()
    folder = tmp_path_factory.mktemp("two-runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(average, "validate", means_are(worse=True))
        assert train_model.main(flags(photos, folder, weights, "--runs", "2")) == 0
    return folder


@pytest.fixture
def folder(two_runs: Path, tmp_path: Path) -> Path:
    """A copy to write in."""
    return shutil.copytree(two_runs, tmp_path / "two-runs")


def flags(photos: Path, folder: Path, weights: Path, *more: str) -> list[str]:
    return arguments(photos, folder, "--weights", str(weights), "--epochs", "2", *more)


def right(number: int, of: int = 100, first: int = 0) -> np.ndarray:
    """Hits: so many of the images, from this one on."""
    hits = np.zeros(of, dtype=bool)
    hits[first : first + number] = True
    return hits


def means_are(worse: bool) -> Callable[..., tuple[np.ndarray, float]]:
    """In place of measuring: every network after the first two is worse than these, or is not."""
    answers = iter([right(50), right(49), *[right(40 if worse else 50)] * 9])
    return lambda *_: (next(answers), 0.5)


def versions_of(folder: Path) -> list[Any]:
    models = folder / "models"
    return [read_record(models, version) for version in list_versions(models)]


# What is made ---------------------------------------------------------------------------------


def test_a_mean_is_released_like_any_version_and_names_its_parents(
    folder: Path,
    photos: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO)
    models, command = folder / "models", flags(photos, folder, weights, "--average", "v2", "1")
    for _ in range(2):  # the second finds what the first made
        monkeypatch.setattr(average, "validate", means_are(worse=False))
        assert train_model.main(command) == 0
        assert list_versions(models) == [1, 2, 3]
    record = read_record(models)
    assert_has_a_run(folder / "runs" / record.training["run"])
    assert record.version == 3 and record.training["parents"] == [2, 1]
    assert (record.metrics["val_acc"], record.metrics["val_loss"]) == (0.5, 0.5)
    assert "best_epoch" not in record.metrics and "best epoch" not in caplog.messages[-3]
    one, two, mean = (read_state(models, r) for r in versions_of(folder))
    for name, value in mean.items():
        expected = (one[name].double() + two[name].double()) / 2
        assert torch.equal(value, expected.to(value.dtype)), name
    report = models / "food_model_v3"
    assert "The mean of the weights of v2, v1." in (report / "MODEL_CARD.md").read_text()
    assert json.loads((report / "evaluation_results.json").read_text())["num_images"] == 9
    assert (report / "report.html").exists()
    assert train_model.main([*command[:-3], "--compare", "v1", "v3"]) == 0
    assert "9 images" in capsys.readouterr().out
    assert train_model.main([*command[:-3], "--average", "v1", "v3"]) == 1
    assert "v3 is a mean itself; name its parents: v2 v1" in caplog.text


def assert_has_a_run(run_dir: Path) -> None:
    """The run of the mean has its record and its lists of images, and MLflow was off."""
    assert {path.name for path in run_dir.iterdir()} == {RECORD_NAME, MANIFEST_NAME}
    assert len(read_manifest(run_dir).test) == 9
    starts, ends = (read_events(run_dir / RECORD_NAME)[i::2] for i in (0, 1))
    assert len({start["run"] for start in starts}) == 1, "the second command is the same run"
    for end in ends:
        assert (end["status"], end["model"]["version"]) == ("FINISHED", 3)
        assert all((run_dir / file).is_file() for file in end["model"]["files"])


def test_a_mean_is_tracked_where_its_parents_were_or_where_the_flags_say(two_runs: Path) -> None:
    first = versions_of(two_runs)[0]
    tracked = dataclasses.replace(
        first, training={**first.training, "no_mlflow": False, "tracking_uri": "sqlite:///a.db"}
    )
    on, off = TrainingConfig(), TrainingConfig(no_mlflow=True)

    def where(record: Any, config: TrainingConfig, uri: str | None) -> str | None:
        settings = settings_of_mean(record, config, uri)
        return None if settings.no_mlflow else settings.tracking_uri

    assert where(tracked, on, None) == "sqlite:///a.db"
    assert where(tracked, on, "sqlite:///b.db") == where(first, on, "sqlite:///b.db")
    assert where(first, on, "sqlite:///b.db") == "sqlite:///b.db"
    assert where(first, on, None) is None, "its parents were trained without"
    assert where(tracked, off, "sqlite:///b.db") is None


def test_nothing_is_released_where_one_alone_is_best(
    two_runs: Path,
) -> None:
    (record,) = (two_runs / "runs").glob(f"average-*/{RECORD_NAME}")
    assert [(e["event"], e.get("status"), e.get("model")) for e in read_events(record)] == [
        ("start", None, None),
        ("end", "FINISHED", None),
    ]
    assert [r.version for r in versions_of(two_runs)] == [1, 2]
    seeds = [(r.training["seed"], r.training["split_seed"]) for r in versions_of(two_runs)]
    assert seeds == [(42, None), (43, 42)]
    one, two = (read_manifest(two_runs / "runs" / r.training["run"]) for r in versions_of(two_runs))
    assert one.train.paths == two.train.paths and one.val.paths == two.val.paths


def test_the_mean_is_made_greedily_of_what_it_holds_with(
    two_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best one first; a mean may be worse than it by one standard error, whatever it loses."""
    records = [dataclasses.replace(versions_of(two_runs)[0], version=n) for n in (1, 2, 3, 4)]
    states = {n: {"x": torch.tensor([float(n)])} for n in (1, 2, 3, 4)}
    answers = iter(
        [
            (right(50), 0.9),
            (right(80), 0.8),  # version 2, the best alone
            (right(80), 0.9),
            (right(70), 0.2),
            (right(79), 1.7),  # with 3: one less
            (right(75, first=3), 0.1),  # and with 4: 3 lost at one end, 2 at the other
            (right(80, first=2), 0.3),  # and with 1: 2 gained, 2 lost
        ]
    )
    loaded: list[float] = []

    class Network:
        def load_state_dict(self, state: dict[str, Tensor]) -> None:
            loaded.append(float(state["x"]))

    monkeypatch.setattr(average, "build_model", lambda *_: Network())
    monkeypatch.setattr(average, "read_state", lambda _, record: states[record.version])
    monkeypatch.setattr(average, "validate", lambda *_: next(answers))
    data = read_manifest(two_runs / "runs" / records[0].training["run"])
    soup = greedy_soup(records, data, TrainingConfig(), 0, CPU)
    assert soup.parents == (2, 3, 1) and (soup.val_acc, soup.val_loss) == (0.8, 0.3)
    assert float(soup.state["x"]) == 2
    assert loaded == pytest.approx([1, 2, 3, 4, 2.5, 3, 2])


def test_counters_are_not_averaged() -> None:
    states = [{"w": torch.tensor([v]), "n": torch.tensor(k)} for v, k in ((1.0, 3), (2.0, 5))]
    mean = mean_of(states)
    assert mean["w"].tolist() == [1.5] and mean["n"].tolist() == 3


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"class_to_idx": {"a": 0, "b": 1, "c": 2}}, "v1 and v2 know other classes"),
        ({"model_name": "resnet50"}, "model_name is standin, resnet50"),
        ({"weights": "other.pth"}, "weights is start.pth, other.pth"),
        ({"freeze_layers": 4}, "freeze_layers is 2, 4"),
        ({"preprocessing": None}, "see pictures at other sizes"),
    ],
)
def test_versions_that_do_not_belong_together_are_refused(
    change: dict[str, Any], why: str, two_runs: Path
) -> None:
    one, two = versions_of(two_runs)
    known = {field.name for field in dataclasses.fields(two)} - {"model_name"}
    if change.keys() <= known:
        two = dataclasses.replace(two, **change)
    else:
        two = dataclasses.replace(two, training={**two.training, **change})
    with pytest.raises(ArtifactError, match=why):
        check_alike([one, two])


def test_random_weights_share_no_start(two_runs: Path) -> None:
    records = [
        dataclasses.replace(r, training={**r.training, "weights": "none"})
        for r in versions_of(two_runs)
    ]
    with pytest.raises(ArtifactError, match="from random weights"):
        check_alike(records)


@pytest.mark.parametrize(
    ("versions", "why"), [(["v9", "v1"], "no version 9"), (["v1", "v1"], "at least two versions")]
)
def test_a_version_that_is_not_there_or_named_twice_is_one_line(
    versions: list[str],
    why: str,
    two_runs: Path,
    photos: Path,
    weights: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    command = flags(photos, two_runs, weights, "--average", *versions)
    assert train_model.main(command) == 1
    assert why in caplog.records[-1].getMessage()
    assert "\n" not in caplog.records[-1].getMessage()


def test_photos_that_are_gone_are_one_line(
    folder: Path, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for manifest in folder.glob("runs/*/images.json"):
        manifest.write_text(manifest.read_text().replace("/photos/", "/moved/"))
    command = flags(folder, folder, weights, "--average", "v1", "v2")
    assert train_model.main(command) == 1
    assert "images can be read" in caplog.records[-1].getMessage()
    for manifest in folder.glob("runs/*/images.json"):
        manifest.unlink()
    assert train_model.main(command) == 1
    assert "the photos of v1 are not known" in caplog.records[-1].getMessage()
    assert list_versions(folder / "models") == [1, 2]


def test_photos_that_one_of_them_was_trained_on_judge_nothing(two_runs: Path, folder: Path) -> None:
    """Runs with a split each have seen one another's validation photos."""
    records, runs = versions_of(two_runs), folder / "runs"
    one, two = (read_manifest(runs / record.training["run"]) for record in records)
    assert photos_of(records, runs).val.paths == one.val.paths
    path = runs / records[1].training["run"] / "images.json"
    lists = json.loads(path.read_text())
    for name in lists["val"]:
        lists["val"][name], lists["train"][name] = lists["train"][name], lists["val"][name]
    path.write_text(json.dumps(lists))
    with pytest.raises(ArtifactError, match="on one another's validation photos: of these 0 are"):
        photos_of(records, runs)
    assert two.val.paths == one.val.paths


@pytest.mark.parametrize(
    ("more", "environment", "why"),
    [
        (("--resume", "x.pt"), {}, "must be auto"),
        ((), {"WORLD_SIZE": "2"}, "leave torchrun out"),
    ],
)
def test_several_runs_are_one_process_and_their_own_checkpoints(
    more: tuple[str, ...],
    environment: dict[str, str],
    why: str,
    tmp_path: Path,
    photos: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as raised:
        train_model.main(flags(photos, tmp_path, weights, "--runs", "2", *more))
    assert raised.value.code == 2 and why in capsys.readouterr().err


def test_several_runs_read_what_a_launcher_left_as_one_run_does(
    tmp_path: Path,
    photos: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert train_model.main(flags(photos, tmp_path, weights, "--runs", "2")) == 1
    assert "WORLD_SIZE=two in the environment: must be a whole number" in caplog.messages[-1]


# Resuming -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stopped_second_run_goes_on_and_the_first_is_not_trained_again(
    tmp_path: Path,
    photos: Path,
    weights: Path,
    two_runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    command = flags(photos, tmp_path, weights, "--runs", "2", "--resume", "auto")
    with monkeypatch.context() as patch:
        after(patch, train_model, "gradients", 8 + 6, send(signal.SIGTERM))  # 8 batches a run
        assert train_model.main(command) == 143
    assert list_versions(tmp_path / "models") == [1]
    monkeypatch.setattr(average, "validate", means_are(worse=False))
    assert train_model.main(command) == 0
    assert "run 2 of 2, seed 43" in caplog.text and caplog.text.count("run 1 of 2") == 1
    assert [r.training.get("parents") for r in versions_of(tmp_path)] == [None, None, [1, 2]]
    for then, now in zip(versions_of(two_runs), versions_of(tmp_path), strict=False):
        expected = read_state(two_runs / "models", then)
        state = read_state(tmp_path / "models", now)
        assert all(torch.equal(state[name], value) for name, value in expected.items())
