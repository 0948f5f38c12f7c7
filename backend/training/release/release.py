"""From trained weights to a released version: calibrate, test once, save, verify, report."""

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from app.ml.activation import MapMaker
from app.ml.artifacts import (
    CENTROIDS,
    FORMAT_VERSION,
    DamagedArtifactError,
    ModelRecord,
    NewVersion,
    OwnAnswers,
    list_versions,
    make_current,
    new_version,
    read_record,
    reason_of,
    state_bytes,
)
from app.ml.drift import RECORD_KEY
from app.ml.forms import FORM_SUFFIXES, Runtime
from app.ml.predictor import OnnxNetwork, TorchNetwork, forms_of
from app.ml.preprocessing import EvalTransform, normalize
from training.config import TrainingConfig
from training.data.splits import FoodData
from training.release.confusion import write_confusion_matrix
from training.release.evaluation import (
    Evaluation,
    FormEvaluation,
    evaluate_model,
    read_images,
)
from training.release.export import check_logits
from training.release.metrics import PREDICTION_COLUMNS, PREDICTIONS_NAME
from training.release.promotion import is_worse_than_current, read_test
from training.release.report import (
    ClassLook,
    FormFacts,
    ReportFacts,
    write_model_card,
    write_report,
)
from training.release.tables import write_table

LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pillow",
    "scikit-learn",
    "scipy",
    "onnxruntime",
)
VERIFY_IMAGES = 16

logger = logging.getLogger(__name__)


class Averaged(NamedTuple):
    """The versions whose mean a model is, and what it reaches on validation."""

    parents: tuple[int, ...]
    val_acc: float
    val_loss: float


@dataclass(frozen=True)
class TrainingResult:
    """What the release needs to know of the run that trained the model.

    history: one record per epoch. skipped: path -> why it could not be read. frozen_int8: training
    images went through the frozen layers in INT8. averaged: of a mean of versions, which has no
    epochs of its own.
    """

    run_name: str
    command: str
    config: TrainingConfig
    history: list[dict[str, float]]
    best_epoch: int
    stopped_early: bool
    skipped: dict[str, str]
    num_workers: int
    frozen_int8: bool = False
    averaged: Averaged | None = None


def release_model(
    model: nn.Module, data: FoodData, result: TrainingResult, device: torch.device
) -> ModelRecord:
    """Test the model and save it as the next version; a run that has its version keeps it.

    Raises:
        SaveError: it could not be tested, saved or verified; earlier versions are untouched.
    """
    config = result.config
    if record := _version_of(result):
        is_newest = record.version == list_versions(config.output_dir)[-1]
        if is_newest and may_become_current(config, config.output_dir, record):
            make_current(config.output_dir, record)
        return record
    model = model.cpu().eval()
    evaluation = evaluate_model(model, data, config, result.num_workers, device)
    began = time.perf_counter()
    with new_version(config.output_dir) as version:
        evaluation = write_forms(version, evaluation)
        record = make_record(version, data, result, evaluation)
        version.write_record(record)
        look = look_with(version.folder, record)
        write_reports(version.report_folder, record, data, result, evaluation, look)
        verify(version, model, evaluation)
        version.becomes_current = may_become_current(config, version.folder, record)
    log_seconds({**evaluation.seconds, "saving": time.perf_counter() - began})
    return record


def may_become_current(config: TrainingConfig, folder: Path, record: ModelRecord) -> bool:
    """Say whether a version that lies in a folder should replace the current one."""
    if config.no_promote:
        return False
    return not is_worse_than_current(config.output_dir, read_test(folder, record.version))


def write_forms(version: NewVersion, evaluation: Evaluation) -> Evaluation:
    """Write the model's files; a form with answers of its own that finds no room is left out.

    Returns the evaluation of what was written.
    """
    for runtime, data in evaluation.forms.items():
        if runtime not in evaluation.own:
            version.write(FORM_SUFFIXES[runtime], data)
    version.write(CENTROIDS, state_bytes(evaluation.plain.fit.centroids))
    own, missing = dict(evaluation.own), dict(evaluation.missing)
    for runtime, form in evaluation.own.items():
        files = {
            FORM_SUFFIXES[runtime]: evaluation.forms[runtime],
            f".{runtime}{CENTROIDS}": state_bytes(form.fit.centroids),
        }
        try:
            for suffix, data in files.items():
                version.write(suffix, data)
        except (OSError, MemoryError) as error:
            for suffix in files:
                version.remove(suffix)
            del own[runtime]
            missing[runtime] = f"it could not be saved: {reason_of(error)}"
            logger.warning("no %s form: %s", runtime, missing[runtime])
    return dataclasses.replace(evaluation, own=own, missing=missing)


def log_seconds(seconds: dict[str, float]) -> None:
    """Log what each phase of the release took."""
    phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
    logger.info("released in %.1f s: %s", sum(seconds.values()), phases)


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
        decision=evaluation.plain.fit.decision,
        sha256=version.sha256,
        metrics={**_form_metrics(evaluation.plain), **_validation(result)},
        training={
            "run": result.run_name,
            "epochs_done": len(result.history),
            "frozen_int8": result.frozen_int8,
            **({"parents": list(result.averaged.parents)} if result.averaged else {}),
            **result.config.to_dict(),
        },
        libraries=library_versions(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        forms={
            runtime: OwnAnswers(form.fit.decision, _form_metrics(form))
            for runtime, form in evaluation.own.items()
        },
    )


def _form_metrics(form: FormEvaluation) -> dict[str, Any]:
    results = form.results
    return {
        "test_top1": results["top1"],
        "test_top1_ci95": results["top1_ci95"],
        "test_top5": results["top5"],
        "test_balanced_accuracy": results["balanced_accuracy"],
        "test_loss": results["loss"],
        "test_ece": results["calibration"]["ece_after"],
        "test_images": results["num_images"],
        RECORD_KEY: form.validation,
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
    look: ClassLook,
) -> None:
    """Fill the version's report folder."""
    results, rows = evaluation.plain.results, evaluation.rows
    facts = report_facts(record, data, result, evaluation)
    about = {"verdicts": evaluation.plain.verdicts, "run": result.run_name}
    about["forms"] = {row["name"]: row for row in facts["forms"]}
    (folder / "evaluation_results.json").write_text(
        _results_json({**about, **results}),
        encoding="utf-8",
        errors="backslashreplace",
    )
    write_table(folder / PREDICTIONS_NAME, PREDICTION_COLUMNS, rows)
    with _skipped_if_it_fails(folder / "confusion_matrix.png") as path:
        write_confusion_matrix(results, path)
    with _skipped_if_it_fails(folder / "report.html") as path:
        history = result.history
        write_report(path, results=results, rows=rows, history=history, facts=facts, look=look)
    with _skipped_if_it_fails(folder / "MODEL_CARD.md") as path:
        write_model_card(path, results=results, facts=facts)


def look_with(folder: Path, record: ModelRecord) -> ClassLook:
    """Return what says where a version that lies in a folder looked, as the server would."""
    make_map, transform = MapMaker(folder, record), EvalTransform(record.preprocessing)
    return lambda class_name, image: make_map(transform(image), class_name)


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
    """Compare each saved form with what it was made from; see `check_logits`."""
    assert version.record
    paths = tuple(row["file"] for row in evaluation.rows[:VERIFY_IMAGES])
    pixels = read_images(paths, evaluation.preprocessing)
    images = normalize(pixels, evaluation.preprocessing)
    trained = TorchNetwork(model, version.record.model_name, torch.device("cpu"))(images)[0]
    expected: dict[Runtime, Tensor] = {}
    for runtime in forms_of(version.record):
        own = runtime in evaluation.own
        expected[runtime] = (
            OnnxNetwork(bytes(evaluation.forms[runtime]), None)(images)[0] if own else trained
        )
    check_logits(version.folder, version.number, pixels, expected)


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


def library_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def report_facts(
    record: ModelRecord, data: FoodData, result: TrainingResult, evaluation: Evaluation
) -> ReportFacts:
    """Collect what the report and the model card say beside the numbers."""
    config, num_epochs = result.config, len(result.history)
    skipped = {**result.skipped, **evaluation.skipped}
    unreadable = [{"path": path, "reason": why} for path, why in skipped.items()]
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
        "verdicts": evaluation.plain.verdicts,
        "forms": form_facts(evaluation),
        "audit": {**data.audit, "skipped": [*data.audit["skipped"], *unreadable]},
        "versions": record.libraries,
        "timings": {
            "training": sum(epoch["seconds"] for epoch in result.history),
            **evaluation.seconds,
        },
        "command": result.command,
        "created": record.created,
    }


def form_facts(evaluation: Evaluation) -> list[FormFacts]:
    """List the forms of the model, and, with the reason, those that it could not have."""
    facts = []
    for runtime, data in evaluation.forms.items():
        if runtime not in evaluation.missing:
            form = evaluation.own.get(runtime, evaluation.plain)
            facts.append(_form_facts(runtime, form, len(data)))
    for runtime, reason in evaluation.missing.items():
        facts.append(
            FormFacts(
                name=runtime,
                bytes=None,
                test_top1=None,
                test_ece=None,
                remark=f"not released: {reason}",
            )
        )
    return facts


def _form_facts(runtime: Runtime, form: FormEvaluation, num_bytes: int) -> FormFacts:
    return {
        "name": runtime,
        "bytes": num_bytes,
        "test_top1": form.results["top1"],
        "test_ece": form.results["calibration"]["ece_after"],
        "remark": str(form.fit.comparison or "answers as the trained network"),
    }
