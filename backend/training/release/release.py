"""From trained weights to a released version: calibrate, test once, save, verify, report."""

import contextlib
import importlib.metadata
import io
import json
import logging
import warnings
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from app.ml.artifacts import (
    CLASS_MAP_NAME,
    CONFIG_NAME,
    FORMAT_VERSION,
    DamagedArtifactError,
    Decision,
    ModelRecord,
    SaveError,
    list_versions,
    make_current,
    read_record,
    record_name,
    report_folder_name,
    save_version,
)
from app.ml.model import ServedNetwork, backbone, inference_copy
from app.ml.predictor import TorchNetwork, load_model_for_inference, nearest_centroid
from app.ml.preprocessing import PreprocessConfig, normalize
from training.config import TrainingConfig
from training.data.loader import EvalImages, ImageLoader, KeyBatches
from training.data.splits import FoodData, Split
from training.errors import VerificationError
from training.release.calibration import class_centroids, fit_decision, verdict_shares
from training.release.metrics import (
    PREDICTIONS_NAME,
    evaluate,
    prediction_rows,
    write_predictions_csv,
)
from training.release.report import write_confusion_matrix, write_model_card, write_report

LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "scikit-learn")
EVAL_BATCH_SIZE = 64
VERIFY_IMAGES = 32
CENTROID_IMAGES = 100  # of each class, to find its centre
ONNX_TOLERANCE = 1e-3  # largest difference between the logits of both forms

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFacts:
    """What the release needs to know of the run that trained the model."""

    run_name: str
    command: str
    config: TrainingConfig
    history: list[dict[str, float]]
    best_epoch: int
    stopped_early: bool
    left_out: dict[str, str]
    num_workers: int


@dataclass(frozen=True)
class Predictions:
    """What the network gives for a split's readable images.

    paths: N. labels: (N,). logits: (N, C). pooled: (N, num_features), what the head saw.
    """

    paths: list[str]
    labels: np.ndarray
    logits: np.ndarray
    pooled: Tensor
    left_out: dict[str, str]


@dataclass(frozen=True)
class Examined:
    """What calibrating and testing found: all that is released beside the weights."""

    preprocessing: PreprocessConfig
    decision: Decision
    centroids: Tensor
    results: dict[str, Any]
    rows: list[dict[str, Any]]
    verdicts: dict[str, Any]
    left_out: dict[str, str]


def release_model(
    model: nn.Module, data: FoodData, facts: RunFacts, device: torch.device
) -> ModelRecord:
    """Test the model and save it as the next version; a run that has its version keeps it.

    Raises:
        SaveError: it could not be saved or verified; earlier versions are untouched.
    """
    config = facts.config
    if record := _version_of(facts, config.output_dir):
        make_current(config.output_dir, record)
        return record
    model = model.cpu().eval()
    examined = examine(model, data, facts, device)
    return save_version(
        config.output_dir,
        state={name: t.contiguous() for name, t in model.state_dict().items()},
        centroids=examined.centroids,
        onnx=export_onnx(model, config.model_name, examined.preprocessing),
        make_record=partial(make_record, data, facts, examined),
        write_report=partial(write_reports, data, facts, examined),
        verify=partial(verify, model, facts, examined),
    )


def examine(model: nn.Module, data: FoodData, facts: RunFacts, device: torch.device) -> Examined:
    """Fit on the validation split how logits become an answer, then test once."""
    model_name = facts.config.model_name
    preprocessing = PreprocessConfig(**backbone(model_name).preprocessing)
    network = TorchNetwork(model, model_name, device)

    def predicted(split: Split) -> Predictions:
        return predict_split(network, split, preprocessing, facts.num_workers, device)

    logger.info("calibrating on %d validation images", len(data.val))
    val, known = predicted(data.val), predicted(some_of_each(data.train))
    centroids = class_centroids(known.pooled, known.labels, len(data.class_to_idx))

    def scored(split: Predictions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return split.logits, split.labels, nearest_centroid(split.pooled, centroids).numpy()

    decision = fit_decision(*scored(val))
    logger.info("testing on %d images", len(data.test))
    test, temperature = predicted(data.test), decision.temperature
    classes = sorted(data.class_to_idx, key=data.class_to_idx.__getitem__)
    return Examined(
        preprocessing=preprocessing,
        decision=decision,
        centroids=centroids,
        results=evaluate(test.logits, test.labels, classes, temperature=temperature),
        rows=prediction_rows(test.paths, test.labels, test.logits, classes, temperature),
        verdicts={
            "validation": verdict_shares(decision, *scored(val)),
            "test": verdict_shares(decision, *scored(test)),
        },
        left_out={**facts.left_out, **val.left_out, **test.left_out},
    )


def make_record(
    data: FoodData, facts: RunFacts, examined: Examined, version: int, sha256: dict[str, str]
) -> ModelRecord:
    """Everything about the version but its weights."""
    return ModelRecord(
        format_version=FORMAT_VERSION,
        version=version,
        model_name=facts.config.model_name,
        class_to_idx=data.class_to_idx,
        preprocessing=examined.preprocessing,
        decision=examined.decision,
        sha256=sha256,
        metrics=_metrics(examined.results, facts),
        training={
            "run": facts.run_name,
            "epochs_done": len(facts.history),
            **facts.config.to_dict(),
        },
        libraries=library_versions(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _metrics(results: dict[str, Any], facts: RunFacts) -> dict[str, Any]:
    best = facts.history[facts.best_epoch - 1]
    return {
        "test_top1": results["top1"],
        "test_top1_ci95": results["top1_ci95"],
        "test_top5": results["top5"],
        "test_loss": results["loss"],
        "test_ece": results["calibration"]["ece_after"],
        "test_images": results["num_images"],
        "best_epoch": facts.best_epoch,
        "val_acc": best["val_acc"],
        "val_loss": best["val_loss"],
    }


def write_reports(
    data: FoodData, facts: RunFacts, examined: Examined, folder: Path, record: ModelRecord
) -> None:
    """Fill the version's report folder."""
    results, rows = examined.results, examined.rows
    page_facts = report_facts(record, facts, data, examined)
    told = {"verdicts": examined.verdicts, "run": facts.run_name}
    text = json.dumps({**results, **told}, indent=2, ensure_ascii=False)
    (folder / "evaluation_results.json").write_text(text, encoding="utf-8")
    write_predictions_csv(folder / PREDICTIONS_NAME, rows)
    write_confusion_matrix(results, folder / "confusion_matrix.png")
    write_report(
        folder / "report.html",
        results=results,
        rows=rows,
        history=facts.history,
        facts=page_facts,
    )
    write_model_card(folder / "MODEL_CARD.md", results=results, facts=page_facts)


def verify(model: nn.Module, facts: RunFacts, examined: Examined, folder: Path) -> None:
    """Compare the saved version with the trained network; see `check_logits`."""
    paths = tuple(row["file"] for row in examined.rows[:VERIFY_IMAGES])
    images = _read(paths, examined.preprocessing)
    plain = TorchNetwork(model, facts.config.model_name, torch.device("cpu"))
    check_logits(folder, images, plain(normalize(images, examined.preprocessing))[0])


def _version_of(facts: RunFacts, output_dir: Path) -> ModelRecord | None:
    """The version that the run released before it was cut off, if it came that far."""
    run = (facts.run_name, len(facts.history))
    for version in reversed(list_versions(output_dir)):
        try:
            record = read_record(output_dir, version)
        except DamagedArtifactError as error:
            logger.warning("passed over: %s", error)
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
    """The logits of every image as serving would compute them, in the order of the split.

    Raises:
        SaveError: not one image can be read.
    """
    keys = KeyBatches(len(split), EVAL_BATCH_SIZE)
    loader = ImageLoader(EvalImages(split.paths, config), keys, num_workers, device)
    indices, logits, pooled = [], [], []
    with contextlib.closing(loader):
        for batch in loader.batches(epoch=0, view=0):
            if len(batch.indices):
                indices.append(batch.indices)
                outputs = network(normalize(batch.images, config))
                logits.append(outputs[0])
                pooled.append(outputs[1])
    if not indices:
        raise SaveError(
            f"not one of {len(split)} images can be read, {split.paths[0]} for one; put them back"
        )
    order = torch.cat(indices).numpy()
    return Predictions(
        paths=[split.paths[i] for i in order],
        labels=split.labels[order],
        logits=torch.cat(logits).numpy(),
        pooled=torch.cat(pooled),
        left_out=loader.left_out,
    )


def some_of_each(split: Split) -> Split:
    """At most `CENTROID_IMAGES` images of each class, the first of the split."""
    chosen = [np.flatnonzero(split.labels == c)[:CENTROID_IMAGES] for c in np.unique(split.labels)]
    indices = np.sort(np.concatenate(chosen))
    return Split(tuple(split.paths[i] for i in indices), split.labels[indices])


def export_onnx(model: nn.Module, model_name: str, config: PreprocessConfig) -> bytes:
    """The network, batch-norm folded: images (N, 3, crop, crop) to logits and what the head saw."""
    served = ServedNetwork(model, model_name)
    network = inference_copy(served, torch.device("cpu"), torch.float32)
    network = network.to(memory_format=torch.contiguous_format)
    example = torch.zeros(2, 3, config.crop, config.crop)
    buffer: Any = io.BytesIO()  # taken by the exporter, though not declared
    with warnings.catch_warnings():
        # torch calls this exporter the legacy one. For these networks it gives the same graph as
        # the new one in a fifth of the time (3 s instead of 15) and needs no further package.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.onnx.export(
            network,
            (example,),
            buffer,
            dynamo=False,
            input_names=["images"],
            output_names=["logits", "pooled"],
            dynamic_axes={"images": {0: "n"}, "logits": {0: "n"}, "pooled": {0: "n"}},
            opset_version=17,
        )
    return buffer.getvalue()


def check_logits(folder: Path, images: Tensor, expected: Tensor) -> None:
    """Load the current version of a folder in both forms; both must give these logits.

    Raises:
        VerificationError: they do not.
    """
    tolerances: dict[Literal["torch", "onnx"], float] = {"torch": 0.0, "onnx": ONNX_TOLERANCE}
    for runtime, tolerance in tolerances.items():
        predictor = load_model_for_inference(folder, runtime=runtime)
        logits = predictor.logits(images)
        difference = float((logits - expected).abs().max())
        same_answers = bool((logits.argmax(1) == expected.argmax(1)).all())
        if not (difference <= tolerance and (same_answers or difference == 0)):
            raise VerificationError(
                f"the saved model ({runtime}) gives other logits than the trained one: they "
                f"differ by up to {difference:.2g}, allowed is {tolerance:g}"
            )


def _read(paths: tuple[str, ...], config: PreprocessConfig) -> Tensor:
    keys = KeyBatches(len(paths), len(paths))
    loader = ImageLoader(EvalImages(paths, config), keys, 0, torch.device("cpu"))
    return next(iter(loader.batches(epoch=0, view=0))).images


def library_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def report_facts(
    record: ModelRecord, facts: RunFacts, data: FoodData, examined: Examined
) -> dict[str, Any]:
    """What the report and the model card say beside the numbers."""
    named = [{"path": path, "reason": reason} for path, reason in examined.left_out.items()]
    epochs = facts.history
    return {
        "model_name": record.model_name,
        "version": record.version,
        "best_epoch": facts.best_epoch,
        "stopped_epoch": len(epochs) if facts.stopped_early else None,
        "stop_reason": "early stopping" if facts.stopped_early else "all epochs done",
        "config": facts.config.to_dict(),
        "classes": record.classes,
        "verdicts": examined.verdicts,
        "audit": {**data.audit, "left_out": [*data.audit["left_out"], *named]},
        "versions": record.libraries,
        "timings": {"training": sum(epoch["seconds"] for epoch in epochs)},
        "command": facts.command,
        "created": record.created,
    }


def released_files(output_dir: Path, record: ModelRecord) -> list[Path]:
    """Everything that belongs to a version, and the files that name the current one."""
    version = record.version
    names = [*record.sha256, record_name(version), CLASS_MAP_NAME, CONFIG_NAME]
    report = output_dir / report_folder_name(version)
    return [output_dir / name for name in names] + sorted(report.iterdir())
