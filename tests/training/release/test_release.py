"""A release: whole or not at all, whatever fails on the way; never stopped by a picture."""

import copy
import csv
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jinja2
import matplotlib.figure
import numpy as np
import pytest
import torch
from tests.support import standin
from tests.support.runs import draw_photos
from torch import Tensor, nn

from app.ml.artifacts import NewVersion, SaveError, list_versions, read_record, released_files
from app.ml.drift import reference_of
from app.ml.forms import FORM_SUFFIXES, Runtime
from app.ml.model import backbone, build_model
from app.ml.predictor import (
    load_model_for_inference,
    nearest_centroid,
)
from app.ml.preprocessing import PreprocessConfig, normalize
from training.config import TrainingConfig
from training.data.loader import eval_loader
from training.data.splits import FoodData, load_food_data
from training.errors import VerificationError
from training.release import evaluation, release
from training.release.calibration import fit_decision
from training.release.evaluation import read_images
from training.release.export import FORMS, Form, Source, export_onnx
from training.release.release import TrainingResult, release_model

CPU = torch.device("cpu")
REPORT = {
    "MODEL_CARD.md",
    "confusion_matrix.png",
    "evaluation_results.json",
    "report.html",
    "test_predictions.csv",
}
PLAIN_FILES = {"food_model_v1.pth", "food_model_v1.onnx", "food_model_v1.centroids.pth"}
INT8_FILES = {"food_model_v1.int8.onnx", "food_model_v1.int8.centroids.pth"}
Trained = Callable[..., TrainingResult]


@pytest.fixture(autouse=True)
def small_backbone() -> None:
    standin.register()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> FoodData:
    return load_food_data(draw_photos(tmp_path_factory.mktemp("data") / "photos"))


@pytest.fixture(scope="module")
def weights(data: FoodData) -> dict[str, Tensor]:
    """Trained on the photos for a second, so that every form knows them."""
    with standin.registered():
        torch.manual_seed(0)
        model = build_model(standin.NAME, len(data.class_to_idx))
        preprocessing = PreprocessConfig(**backbone(standin.NAME).preprocessing)
    images = normalize(read_images(data.train.paths, preprocessing), preprocessing)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.from_numpy(data.train.labels)).backward()
        optimizer.step()
    return model.state_dict()


@pytest.fixture
def model(data: FoodData, weights: dict[str, Tensor]) -> nn.Module:
    standin.register()
    model = build_model(standin.NAME, len(data.class_to_idx))
    model.load_state_dict(weights)
    return model


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    """What a run of two epochs says of itself."""

    def result(**changes: Any) -> TrainingResult:
        epoch = {"train_loss": 1.0, "train_acc": 0.5, "val_loss": 1.0, "val_acc": 0.5}
        epoch |= {"learning_rate": 0.001, "seconds": 2.0, "images_per_second": 13.0}
        values: dict[str, Any] = {
            "run_name": "run-1",
            "command": "python backend/train_model.py",
            "config": TrainingConfig(model_name=standin.NAME, output_dir=tmp_path / "models"),
            "history": [{"epoch": number, **epoch} for number in (1, 2)],
            "best_epoch": 2,
            "stopped_early": False,
            "skipped": {"broken.jpg": "the image data is damaged"},
            "num_workers": 0,
        }
        return TrainingResult(**{**values, **changes})

    return result


def report_of(folder: Path) -> set[str]:
    return {path.name for path in (folder / "food_model_v1").iterdir()}


def test_a_release_is_whole(
    data: FoodData, model: nn.Module, trained: Trained, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    record = release_model(model, data, trained(frozen_int8=True), CPU)
    assert read_record(folder) == record and record.version == 1
    assert record.training["frozen_int8"] is True
    assert record.sha256.keys() == PLAIN_FILES | INT8_FILES
    assert report_of(folder) == REPORT
    assert all(path.is_file() for path in released_files(folder, record))
    assert not list(folder.glob(".staging*"))
    plain = torch.load(folder / "food_model_v1.pth", weights_only=True)
    model.load_state_dict(plain)
    numbers = [v for v in record.metrics.values() if isinstance(v, float)]
    assert all(map(math.isfinite, numbers))
    assert 0 <= record.metrics["test_balanced_accuracy"] <= 1


def test_it_is_served_at_the_size_that_it_was_tested_at(
    data: FoodData, model: nn.Module, trained: Trained, tmp_path: Path
) -> None:
    config = trained().config.with_sizes({"train_crop": 32, "test_resize": 44, "test_crop": 40})
    record = release_model(model, data, trained(config=config), CPU)
    assert (record.preprocessing.resize, record.preprocessing.crop) == (44, 40)
    for runtime in get_args(Runtime):
        served = load_model_for_inference(tmp_path / "models", runtime=runtime)
        pixels = served.preprocess(data.test.paths[0])
        assert pixels.shape == (3, 40, 40)
        assert served.logits(pixels.unsqueeze(0)).shape == (1, 3)


def test_the_results_are_complete_and_agree_with_the_predictions(
    data: FoodData, model: nn.Module, trained: Trained, tmp_path: Path
) -> None:
    record = release_model(model, data, trained(), CPU)
    report = tmp_path / "models" / "food_model_v1"
    text = (report / "evaluation_results.json").read_text(encoding="utf-8")
    results = json.loads(text)
    assert results["top1"] == record.metrics["test_top1"]
    assert results["run"] == "run-1" and set(results["verdicts"]) == {"validation", "test"}
    matrix = np.array(results["confusion_matrix"])
    assert matrix.sum() == results["num_images"] == len(data.test)
    assert all(json.dumps(row) in text for row in matrix.tolist())  # a row is a line
    with (report / "test_predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["correct"] == "True" for row in rows) == np.trace(matrix)
    assert {row["file"] for row in rows} == set(data.test.paths)
    page = (report / "report.html").read_text(encoding="utf-8")
    assert "broken.jpg" in page and "Trained for all 2 epochs." in page
    assert page.count('class="heat"') == page.count('class="seen"') == len(rows)


def test_early_stopping_is_told(
    data: FoodData, model: nn.Module, trained: Trained, tmp_path: Path
) -> None:
    release_model(model, data, trained(stopped_early=True), CPU)
    page = (tmp_path / "models" / "food_model_v1" / "report.html").read_text(encoding="utf-8")
    assert "Stopped early: no lower validation loss for 5 epochs." in page
    assert "stopped after epoch 2" in page


def test_a_run_that_was_released_keeps_its_version(
    data: FoodData, model: nn.Module, trained: Trained, tmp_path: Path
) -> None:
    """It was cut off after its version was complete, and before its record said so."""
    first = release_model(model, data, trained(), CPU)
    (tmp_path / "models" / "model_config.json").unlink()
    assert release_model(model, data, trained(), CPU) == first
    assert read_record(tmp_path / "models") == first
    assert release_model(model, data, trained(run_name="run-2"), CPU).version == 2


ERRORS = [
    MemoryError("std::bad_alloc"),
    RuntimeError("agg\nfailed"),
    OSError(28, "No space left on device"),
    AttributeError("'Figure' object has no attribute 'x'"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(
    ("owner", "name", "missing"),
    [
        (matplotlib.figure.Figure, "savefig", {"confusion_matrix.png"}),
        (jinja2.Template, "render", {"report.html", "MODEL_CARD.md"}),
    ],
    ids=["matplotlib", "jinja"],
)
def test_no_picture_and_no_page_stops_a_release(
    owner: Any,
    name: str,
    missing: set[str],
    error: Exception,
    data: FoodData,
    model: nn.Module,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(owner, name, fail)
    record = release_model(model, data, trained(), CPU)
    assert read_record(tmp_path / "models") == record
    assert report_of(tmp_path / "models") == REPORT - missing
    lines = [m for m in caplog.messages if m.startswith("skipped ")]
    assert {line.split()[1].removesuffix(":") for line in lines} == missing
    assert all(type(error).__name__ in line and "\n" not in line for line in lines)


@pytest.mark.parametrize("name", ["sklearn.metrics.confusion_matrix", "torch.save"])
def test_too_little_memory_is_one_line_and_leaves_nothing(
    name: str,
    data: FoodData,
    model: nn.Module,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(name, fail)
    with pytest.raises(SaveError, match="memory") as raised:
        release_model(model, data, trained(), CPU)
    assert "\n" not in str(raised.value)
    assert not list_versions(tmp_path / "models")


def test_memory_that_torch_lacks_is_one_line_too(
    data: FoodData, model: nn.Module, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate")

    monkeypatch.setattr(evaluation, "nearest_centroid", fail)
    with pytest.raises(SaveError, match=r"^not enough memory to test the model"):
        release_model(model, data, trained(), CPU)


def test_a_form_that_answers_otherwise_is_not_released(
    data: FoodData,
    model: nn.Module,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = FORMS["onnx"]

    def of_another(source: Source) -> bytes | memoryview:
        return right.export(perturbed(source))

    monkeypatch.setitem(FORMS, "onnx", dataclasses.replace(right, export=of_another))
    with pytest.raises(SaveError, match=r"\(onnx\) does not reproduce the logits") as raised:
        release_model(model, data, trained(), CPU)
    assert isinstance(raised.value.__cause__, VerificationError)
    assert not list_versions(tmp_path / "models")


def test_a_form_is_a_row(
    data: FoodData,
    model: nn.Module,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each runtime that reads one has its row, and a release writes what the table says."""
    assert set(FORMS) == set(get_args(Runtime))
    monkeypatch.delitem(FORMS, "onnx")
    record = release_model(model, data, trained(), CPU)
    assert record.sha256.keys() == (PLAIN_FILES | INT8_FILES) - {"food_model_v1.onnx"}
    predictor = load_model_for_inference(tmp_path / "models")
    assert predictor.predict(data.test.paths[0]).top
    assert all(isinstance(form, Form) for form in FORMS.values())


# The INT8 form --------------------------------------------------------------------------------


def perturbed(source: Source, by: float = 0.01) -> Source:
    """The same with other weights."""
    other = copy.deepcopy(source.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by
    return dataclasses.replace(source, model=other)


def int8_made_by(
    monkeypatch: pytest.MonkeyPatch, export: Callable[[Source], bytes | memoryview]
) -> None:
    monkeypatch.setitem(FORMS, "int8", dataclasses.replace(FORMS["int8"], export=export))


def test_the_int8_form_has_its_own_temperature_thresholds_and_centroids(
    data: FoodData, model: nn.Module, trained: Trained, tmp_path: Path
) -> None:
    record = release_model(model, data, trained(), CPU)
    predictor = load_model_for_inference(tmp_path / "models", runtime="int8")
    images = read_images(data.val.paths, record.preprocessing)
    logits, pooled = predictor.network(normalize(images, record.preprocessing))
    similarities = nearest_centroid(pooled, predictor.centroids).numpy()
    fitted = fit_decision(logits.numpy(), data.val.labels, similarities)
    assert vars(predictor.decision) == pytest.approx(vars(fitted), rel=1e-6)
    assert predictor.decision != record.decision
    plain = load_model_for_inference(tmp_path / "models", runtime="onnx")
    assert 0 < (plain.centroids - predictor.centroids).abs().max() < 0.1
    assert record.forms["int8"].metrics.keys() < record.metrics.keys()
    assert record.metrics_of("int8") == {**record.metrics, **record.forms["int8"].metrics}


def test_the_reports_say_which_forms_there_are(
    data: FoodData, model: nn.Module, trained: Trained, tmp_path: Path
) -> None:
    record = release_model(model, data, trained(), CPU)
    report = tmp_path / "models" / "food_model_v1"
    results = json.loads((report / "evaluation_results.json").read_text(encoding="utf-8"))
    assert results["forms"].keys() == {"torch", "onnx", "int8"}
    for runtime, form in results["forms"].items():
        (file,) = (tmp_path / "models").glob(f"food_model_v1{FORM_SUFFIXES[runtime]}")
        assert form["bytes"] == file.stat().st_size
        assert form["test_top1"] == record.metrics_of(runtime)["test_top1"]
    assert (
        "points against the plain network on 6 validation images"
        in (results["forms"]["int8"]["remark"])
    )
    for name in ("report.html", "MODEL_CARD.md"):
        text = (report / name).read_text(encoding="utf-8")
        assert "int8" in text and "on 6 validation images" in text


@pytest.mark.parametrize("error", [*ERRORS, ImportError("No module named 'onnx'")], ids=repr)
def test_a_network_that_cannot_be_quantized_is_released_without(
    error: Exception,
    data: FoodData,
    model: nn.Module,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(_: Source) -> bytes:
        raise error

    int8_made_by(monkeypatch, fail)
    refused_for("it could not be made", data, model, trained, tmp_path, caplog)


def refused_for(
    reason: str,
    data: FoodData,
    model: nn.Module,
    trained: Trained,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> str:
    """The release is whole without the INT8 form; the line that says why is returned."""
    caplog.set_level(logging.INFO)
    record = release_model(model, data, trained(), CPU)
    assert read_record(tmp_path / "models") == record
    assert record.sha256.keys() == PLAIN_FILES and not record.forms
    assert not list((tmp_path / "models").glob("*int8*"))
    assert '"forms"' not in record.to_json()  # the record is one that the version before reads
    assert load_model_for_inference(tmp_path / "models").runtime == "onnx"
    (line,) = (m for m in caplog.messages if m.startswith("no int8 form: "))
    assert reason in line and "\n" not in line
    results = (tmp_path / "models" / "food_model_v1" / "evaluation_results.json").read_text()
    remark = json.loads(results)["forms"]["int8"]["remark"]
    assert remark == line.replace("no int8 form", "not released")
    return line


def test_a_form_that_is_worse_is_not_released_and_the_log_says_by_how_much(
    data: FoodData,
    model: nn.Module,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def always_the_first_class(source: Source) -> bytes | memoryview:
        other = copy.deepcopy(source.model)
        nn.init.zeros_(other.classifier[1].weight)
        return export_onnx(dataclasses.replace(source, model=other))

    int8_made_by(monkeypatch, always_the_first_class)
    line = refused_for("points", data, model, trained, tmp_path, caplog)
    assert "-66.7 points against the plain network on 6 validation images" in line
    assert "(0 answers gained, 4 lost, p = 0.12)" in line


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda _: b"no network", "it cannot be run"),
        (lambda source: export_onnx(perturbed(source, math.nan)), "its answers cannot be used"),
    ],
    ids=["unreadable", "not finite"],
)
def test_a_form_that_cannot_answer_is_not_released(
    made: Any,
    reason: str,
    data: FoodData,
    model: nn.Module,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    int8_made_by(monkeypatch, made)
    refused_for(reason, data, model, trained, tmp_path, caplog)


@pytest.mark.parametrize("suffix", [".int8.onnx", ".int8.centroids.pth"])
def test_a_disk_without_room_for_the_form_has_room_for_the_release(
    suffix: str,
    data: FoodData,
    model: nn.Module,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write = NewVersion.write

    def full(version: NewVersion, name: str, data: bytes | memoryview) -> None:
        if name == suffix:
            raise OSError(28, "No space left on device")
        write(version, name, data)

    monkeypatch.setattr(NewVersion, "write", full)
    refused_for("it could not be saved: ", data, model, trained, tmp_path, caplog)


def test_an_int8_form_that_is_saved_otherwise_is_found(
    data: FoodData, model: nn.Module, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = NewVersion.write

    def other(version: NewVersion, name: str, data: bytes | memoryview) -> None:
        if name == ".int8.onnx":
            data = (version.folder / "food_model_v1.onnx").read_bytes()
        write(version, name, data)

    monkeypatch.setattr(NewVersion, "write", other)
    with pytest.raises(SaveError, match=r"\(int8\) does not reproduce the logits"):
        release_model(model, data, trained(), CPU)


def test_a_form_is_calibrated_on_some_training_images_the_same_for_a_seed(
    data: FoodData, model: nn.Module, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, export = [], FORMS["int8"].export

    def noting(source: Source) -> bytes | memoryview:
        seen.append(source.calibration)
        return export(source)

    int8_made_by(monkeypatch, noting)
    monkeypatch.setattr(evaluation, "CALIBRATION_IMAGES", 10)
    first, again = (release_model(model, data, trained(run_name=name), CPU) for name in "ab")
    own = read_images(data.train.paths, first.preprocessing)
    assert len(seen[0]) == 10
    assert all(any(torch.equal(image, known) for known in own) for image in seen[0])
    assert torch.equal(seen[0], seen[1])
    assert first.sha256["food_model_v1.int8.onnx"] == again.sha256["food_model_v2.int8.onnx"]
    config = dataclasses.replace(trained().config, seed=1)
    release_model(model, data, trained(run_name="c", config=config), CPU)
    assert not torch.equal(seen[0], seen[2])


def test_the_release_says_what_each_phase_took(
    data: FoodData,
    model: nn.Module,
    trained: Trained,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    release_model(model, data, trained(), CPU)
    (line,) = (m for m in caplog.messages if m.startswith("released in "))
    phases = ("writing the forms", "calibration", "test", "saving")
    assert [part.rsplit(" ", 1)[0] for part in line.split(": ")[1].split(", ")] == list(phases)
    page = (tmp_path / "models" / "food_model_v1" / "report.html").read_text(encoding="utf-8")
    assert all(f"<dt>{phase}</dt>" in page for phase in ("training", *phases[:3]))


# Images that are gone -------------------------------------------------------------------------


def test_images_that_are_gone_leave_nothing_to_test(
    data: FoodData, model: nn.Module, trained: Trained, tmp_path: Path
) -> None:
    gone = dataclasses.replace(data.test, paths=tuple(f"{p}.gone" for p in data.test.paths))
    with pytest.raises(SaveError, match=r"none of 9 images can be read, e\.g\. .*\.gone"):
        release_model(model, dataclasses.replace(data, test=gone), trained(), CPU)
    assert not (tmp_path / "models").exists()


def test_images_that_go_before_the_check_are_named(
    data: FoodData, model: nn.Module, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = release.write_reports

    def go(*values: Any) -> None:
        monkeypatch.setattr(evaluation, "eval_loader", functools.partial(gone_loader, eval_loader))
        write(*values)

    monkeypatch.setattr(release, "write_reports", go)
    with pytest.raises(SaveError, match=r"none of 9 images can be read, e\.g\. "):
        release_model(model, data, trained(), CPU)


def gone_loader(loader: Any, paths: Any, *values: Any) -> Any:
    return loader(tuple(f"{path}.gone" for path in paths), *values)


def test_centroids_are_of_a_bounded_number_of_images(
    data: FoodData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "CENTROID_IMAGES", 2)
    some = evaluation.some_of_each(data.train)
    assert np.bincount(some.labels).tolist() == [2, 2, 2]
    assert set(some.paths) < set(data.train.paths)


def test_the_answers_to_the_validation_photos_are_recorded(
    model: nn.Module, data: FoodData, trained: Trained
) -> None:
    """What the server compares its own answers with."""
    result = trained()
    record = release_model(model, data, result, CPU)
    summary = reference_of(record.metrics)
    assert summary
    assert summary["count"] == len(data.val)
    assert sum(summary["confidences"]) == pytest.approx(1)
    results = json.loads(
        (result.config.output_dir / "food_model_v1" / "evaluation_results.json").read_text()
    )
    shares = {name: v["share"] for name, v in results["verdicts"]["validation"].items()}
    assert summary["verdicts"] == pytest.approx(shares)


# Which version is current ---------------------------------------------------------------------


def test_a_version_can_be_held_back(model: nn.Module, data: FoodData, trained: Trained) -> None:
    first = trained()
    release_model(model, data, first, CPU)
    config = dataclasses.replace(first.config, no_promote=True)
    second = trained(run_name="run-2", config=config)
    for _ in range(2):  # the second time as after an interruption
        assert release_model(model, data, second, CPU).version == 2
        assert read_record(config.output_dir).version == 1
    held_back = read_record(config.output_dir, 2)
    assert all(path.is_file() for path in released_files(config.output_dir, held_back))
    promoted = trained(run_name="run-2")
    assert release_model(model, data, promoted, CPU).version == 2
    assert read_record(config.output_dir).version == 2


def test_a_worse_version_does_not_replace_the_current_one(
    model: nn.Module, data: FoodData, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = trained()
    release_model(model, data, result, CPU)
    monkeypatch.setattr(release, "is_worse_than_current", lambda *_: True)
    for _ in range(2):
        assert release_model(model, data, trained(run_name="run-2"), CPU).version == 2
        assert read_record(result.config.output_dir).version == 1
