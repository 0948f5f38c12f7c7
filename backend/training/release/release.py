"""From trained weights to a released version: calibrate, test once, save, verify, report."""

import contextlib
import importlib.metadata
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from app.ml.artifacts import (
    CENTROIDS,
    FORMAT_VERSION,
    DamagedArtifactError,
    Decision,
    ModelRecord,
    NewVersion,
    SaveError,
    list_versions,
    make_current,
    new_version,
    read_record,
    state_bytes,
)
from app.ml.predictor import TorchNetwork, nearest_centroid
from app.ml.preprocessing import PreprocessConfig, normalize
from training.config import TrainingConfig
from training.data.loader import eval_loader
from training.data.splits import FoodData, Split
from training.release.calibration import (
    VerdictShare,
    class_centroids,
    fit_decision,
    verdict_shares,
)
from training.release.confusion import write_confusion_matrix
from training.release.export import FORMATS, check_logits
from training.release.metrics import (
    PREDICTION_COLUMNS,
    PREDICTIONS_NAME,
    PredictionRow,
    Results,
    evaluate,
    prediction_rows,
)
from training.release.report import ReportFacts, write_model_card, write_report
from training.release.tables import write_table

LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "scikit-learn", "scipy")
EVAL_BATCH_SIZE = 64
VERIFY_IMAGES = 32
CENTROID_IMAGES = 100  # of each class, to find its center

logger = logging.getLogger(__name__)


class Averaged(NamedTuple):
    """The versions whose mean a model is, and what it reaches on validation."""

    parents: tuple[int, ...]
    val_acc: float
    val_loss: float


@dataclass(frozen=True)
class TrainingResult:
    """What the release needs to know of the run that trained the model.

    history: one record per epoch. skipped: path -> why it could not be read. averaged: of a mean of
    versions, which has no epochs of its own.
    """

    run_name: str
    command: str
    config: TrainingConfig
    history: list[dict[str, float]]
    best_epoch: int
    stopped_early: bool
    skipped: dict[str, str]
    num_workers: int
    averaged: Averaged | None = None


@dataclass(frozen=True)
class Predictions:
    """What the network gives for a split's readable images.

    paths: N. labels: (N,). logits: (N, C). pooled: (N, num_features), what the head saw.
    """

    paths: list[str]
    labels: np.ndarray
    logits: np.ndarray
    pooled: Tensor
    skipped: dict[str, str]


@dataclass(frozen=True)
class Evaluation:
    """What calibration and the test found: all that is released beside the weights."""

    preprocessing: PreprocessConfig
    decision: Decision
    centroids: Tensor
    results: Results
    rows: list[PredictionRow]
    verdicts: dict[str, dict[str, VerdictShare]]
    skipped: dict[str, str]


def release_model(
    model: nn.Module, data: FoodData, result: TrainingResult, device: torch.device
) -> ModelRecord:
    """Test the model and save it as the next version; a run that has its version keeps it.

    Raises:
        SaveError: it could not be tested, saved or verified; earlier versions are untouched.
    """
    config = result.config
    if record := _version_of(result):
        make_current(config.output_dir, record)
        return record
    model = model.cpu().eval()
    evaluation = evaluate_model(model, data, result, device)
    with new_version(config.output_dir) as version:
        for form in FORMATS.values():
            exported = form.export(model, config.model_name, evaluation.preprocessing)
            version.write(form.suffix, exported)
        version.write(CENTROIDS, state_bytes(evaluation.centroids))
        record = make_record(version, data, result, evaluation)
        version.write_record(record)
        write_reports(version.report_folder, record, data, result, evaluation)
        verify(version, model, evaluation)
    return record


def evaluate_model(
    model: nn.Module, data: FoodData, result: TrainingResult, device: torch.device
) -> Evaluation:
    """Fit on the validation split how logits become an answer, then test once.

    Raises:
        SaveError: a split has no readable image, or memory is short.
    """
    model_name = result.config.model_name
    preprocessing = result.config.preprocessing
    network = TorchNetwork(model, model_name, device)

    def predicted(split: Split) -> Predictions:
        return predict_split(network, split, preprocessing, result.num_workers, device)

    with _memory_shortage_explained():
        logger.info("calibrating on %d validation images", len(data.val))
        val, known = predicted(data.val), predicted(some_of_each(data.train))
        centroids = class_centroids(known.pooled, known.labels, len(data.class_to_idx))

        def scored(split: Predictions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return split.logits, split.labels, nearest_centroid(split.pooled, centroids).numpy()

        decision = fit_decision(*scored(val))
        logger.info("testing on %d images", len(data.test))
        test, temperature = predicted(data.test), decision.temperature
        classes = sorted(data.class_to_idx, key=data.class_to_idx.__getitem__)
        return Evaluation(
            preprocessing=preprocessing,
            decision=decision,
            centroids=centroids,
            results=evaluate(test.logits, test.labels, classes, temperature=temperature),
            rows=prediction_rows(test.paths, test.labels, test.logits, classes, temperature),
            verdicts={
                "validation": verdict_shares(decision, *scored(val)),
                "test": verdict_shares(decision, *scored(test)),
            },
            skipped={**result.skipped, **val.skipped, **test.skipped},
        )


@contextlib.contextmanager
def _memory_shortage_explained() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch says only in words that the CPU's memory is short
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and (
            "DefaultCPUAllocator" not in str(error)
        ):
            raise
        raise SaveError("not enough memory to test the model; free some, or add swap") from error


def make_record(
    version: NewVersion, data: FoodData, result: TrainingResult, evaluation: Evaluation
) -> ModelRecord:
    """Describe everything about the version but its weights."""
    return ModelRecord(
        format_version=FORMAT_VERSION,
        version=version.number,
        model_name=result.config.model_name,
        class_to_idx=data.class_to_idx,
        preprocessing=evaluation.preprocessing,
        decision=evaluation.decision,
        sha256=version.sha256,
        metrics=_metrics(evaluation.results, result),
        training={
            "run": result.run_name,
            "epochs_done": len(result.history),
            **({"parents": list(result.averaged.parents)} if result.averaged else {}),
            **result.config.to_dict(),
        },
        libraries=library_versions(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _metrics(results: Results, result: TrainingResult) -> dict[str, Any]:
    return {
        "test_top1": results["top1"],
        "test_top1_ci95": results["top1_ci95"],
        "test_top5": results["top5"],
        "test_balanced_accuracy": results["balanced_accuracy"],
        "test_loss": results["loss"],
        "test_ece": results["calibration"]["ece_after"],
        "test_images": results["num_images"],
        **_validation(result),
    }


def _validation(result: TrainingResult) -> dict[str, float]:
    if mean := result.averaged:
        return {"val_acc": mean.val_acc, "val_loss": mean.val_loss}
    best = result.history[result.best_epoch - 1]
    numbers = {"val_acc": best["val_acc"], "val_loss": best["val_loss"]}
    return {"best_epoch": result.best_epoch, **numbers}


def write_reports(
    folder: Path,
    record: ModelRecord,
    data: FoodData,
    result: TrainingResult,
    evaluation: Evaluation,
) -> None:
    """Fill the version's report folder."""
    results, rows = evaluation.results, evaluation.rows
    facts = report_facts(record, data, result, evaluation)
    (folder / "evaluation_results.json").write_text(
        _results_json({"verdicts": evaluation.verdicts, "run": result.run_name, **results}),
        encoding="utf-8",
        errors="backslashreplace",
    )
    write_table(folder / PREDICTIONS_NAME, PREDICTION_COLUMNS, rows)
    with _skipped_if_it_fails(folder / "confusion_matrix.png") as path:
        write_confusion_matrix(results, path)
    with _skipped_if_it_fails(folder / "report.html") as path:
        write_report(path, results=results, rows=rows, history=result.history, facts=facts)
    with _skipped_if_it_fails(folder / "MODEL_CARD.md") as path:
        write_model_card(path, results=results, facts=facts)


def _results_json(results: dict[str, Any]) -> str:
    """Write one row of the confusion matrix per line: one number per line would be a million."""
    matrix = ",\n    ".join(json.dumps(row) for row in results["confusion_matrix"])
    rest = {name: value for name, value in results.items() if name != "confusion_matrix"}
    text = json.dumps(rest, indent=2, ensure_ascii=False).removesuffix("\n}")
    return f'{text},\n  "confusion_matrix": [\n    {matrix}\n  ]\n}}\n'


@contextlib.contextmanager
def _skipped_if_it_fails(path: Path) -> Iterator[Path]:
    """Let no picture or page, nor the library that draws it, stop a release."""
    try:
        yield path
    except Exception as error:  # noqa: BLE001
        path.unlink(missing_ok=True)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning("skipped %s: %s", path.name, reason)


def verify(version: NewVersion, model: nn.Module, evaluation: Evaluation) -> None:
    """Compare the saved version with the trained network; see `check_logits`."""
    assert version.record
    paths = tuple(row["file"] for row in evaluation.rows[:VERIFY_IMAGES])
    images = _read(paths, evaluation.preprocessing)
    plain = TorchNetwork(model, version.record.model_name, torch.device("cpu"))
    expected, _ = plain(normalize(images, evaluation.preprocessing))
    check_logits(version.folder, version.number, images, expected)


def _version_of(result: TrainingResult) -> ModelRecord | None:
    """Find the version that the run released before it was interrupted, if it came that far."""
    output_dir, run = result.config.output_dir, (result.run_name, len(result.history))
    for version in reversed(list_versions(output_dir)):
        try:
            record = read_record(output_dir, version)
        except DamagedArtifactError as error:
            logger.warning("skipped: %s", error)
            continue
        if (record.training.get("run"), record.training.get("epochs_done")) == run:
            return record
    return None


def predict_split(
    network: TorchNetwork,
    split: Split,
    config: PreprocessConfig,
    num_workers: int,
    device: torch.device,
) -> Predictions:
    """Compute the logits of every image as serving would, in the order of the split.

    Raises:
        SaveError: none of the images can be read.
    """
    loader = eval_loader(split.paths, config, EVAL_BATCH_SIZE, num_workers, device)
    indices, logits, pooled = [], [], []
    with contextlib.closing(loader):
        for batch in loader:
            if len(batch.indices):
                indices.append(batch.indices)
                outputs = network(normalize(batch.images, config))
                logits.append(outputs[0])
                pooled.append(outputs[1])
    if not indices:
        raise _nothing_read(split.paths)
    order = torch.cat(indices).numpy()
    return Predictions(
        paths=[split.paths[i] for i in order],
        labels=split.labels[order],
        logits=torch.cat(logits).numpy(),
        pooled=torch.cat(pooled),
        skipped=loader.skipped,
    )


def some_of_each(split: Split) -> Split:
    """Take at most `CENTROID_IMAGES` images of each class, the first of the split."""
    chosen = [np.flatnonzero(split.labels == c)[:CENTROID_IMAGES] for c in np.unique(split.labels)]
    indices = np.sort(np.concatenate(chosen))
    return Split(tuple(split.paths[i] for i in indices), split.labels[indices])


def _read(paths: tuple[str, ...], config: PreprocessConfig) -> Tensor:
    loader = eval_loader(paths, config, len(paths), 0, torch.device("cpu"))
    images = next(iter(loader)).images
    if not len(images):
        raise _nothing_read(paths)
    return images


def _nothing_read(paths: Sequence[str]) -> SaveError:
    return SaveError(f"none of {len(paths)} images can be read, e.g. {paths[0]}; put them back")


def library_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def report_facts(
    record: ModelRecord, data: FoodData, result: TrainingResult, evaluation: Evaluation
) -> ReportFacts:
    """Collect what the report and the model card say beside the numbers."""
    config, num_epochs = result.config, len(result.history)
    unreadable = [{"path": path, "reason": why} for path, why in evaluation.skipped.items()]
    reason = f"Trained for all {num_epochs} epochs."
    if result.stopped_early:
        patience = config.early_stopping_patience
        reason = f"Stopped early: no lower validation loss for {patience} epochs."
    if result.averaged:
        parents = ", ".join(f"v{version}" for version in result.averaged.parents)
        reason = f"The mean of the weights of {parents}."
    return {
        "model_name": record.model_name,
        "version": record.version,
        "best_epoch": result.best_epoch,
        "stopped_epoch": num_epochs if result.stopped_early else None,
        "stop_reason": reason,
        "config": config.to_dict(),
        "classes": record.classes,
        "verdicts": evaluation.verdicts,
        "audit": {**data.audit, "skipped": [*data.audit["skipped"], *unreadable]},
        "versions": record.libraries,
        "timings": {"training": sum(epoch["seconds"] for epoch in result.history)},
        "command": result.command,
        "created": record.created,
    }
