"""Released models for the tests that load, serve and compare them."""

import dataclasses
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tests.support import standin
from torch import nn

from app.ml.artifacts import (
    CENTROIDS,
    FORMAT_VERSION,
    ONNX,
    WEIGHTS,
    Decision,
    ModelRecord,
    NewVersion,
    OwnAnswers,
    new_version,
    state_bytes,
)
from app.ml.forms import FORM_SUFFIXES
from app.ml.model import backbone, build_model, head_linear
from app.ml.preprocessing import PreprocessConfig

RECORD = ModelRecord(
    format_version=FORMAT_VERSION,
    version=1,
    model_name="mobilenet_v2",
    class_to_idx={"dosa": 1, "café crème": 0, "samosa": 2},
    preprocessing=PreprocessConfig(256, 224, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)),
    decision=Decision(temperature=1.25, confident_at=0.5, food_at=-3.5),
    sha256={},
    metrics={"top1": 0.5},
    training={"epochs": 1},
    libraries={"torch": torch.__version__},
    created="2026-01-01T00:00:00+00:00",
)

INT8_DECISION = Decision(2.0, confident_at=0.1, food_at=-0.9)


def release_model(
    output_dir: Path,
    classes: list[str],
    model_name: str = "mobilenet_v2",
    seed: int = 0,
    decision: Decision | None = None,
    model: nn.Module | None = None,
    metrics: dict[str, Any] | None = None,
    **training: Any,
) -> ModelRecord:
    """Release a network, with random weights if none is given, as a run would a trained one."""
    torch.manual_seed(seed)
    model = model or build_model(model_name, len(classes))
    num_features = head_linear(model, model_name).in_features
    centroids = nn.functional.normalize(torch.rand(len(classes), num_features), dim=1)
    with new_version(output_dir) as version:
        version.write(WEIGHTS, state_bytes(model.state_dict()))
        version.write(CENTROIDS, state_bytes(centroids))
        record = record_of(version, model_name, classes, decision)
        record = dataclasses.replace(
            record,
            metrics={**record.metrics, **(metrics or {})},
            training={**record.training, **training},
        )
        version.write_record(record)
    return record


def release_forms(
    output_dir: Path,
    classes: list[str],
    *,
    with_int8: bool = True,
    decision: Decision = INT8_DECISION,
) -> ModelRecord:
    """Release the stand-in in each form; the one read as INT8 is another network, to be told by its
    answers, with this decision. Needs the stand-in to be registered."""
    from training.release.export import onnx_bytes

    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(build_model(standin.NAME, len(classes)))
        nn.init.normal_(head_linear(networks[-1], standin.NAME).weight, std=1.0)
    plain, other = (onnx_bytes(network.eval(), standin.NAME, 32) for network in networks)
    own = OwnAnswers(decision, {"top1": 0.75})
    with new_version(output_dir) as version:
        version.write(WEIGHTS, state_bytes(networks[0].state_dict()))
        version.write(ONNX, plain)
        version.write(CENTROIDS, state_bytes(nn.functional.normalize(torch.rand(len(classes), 64))))
        if with_int8:
            version.write(FORM_SUFFIXES["int8"], other)
            centroids = nn.functional.normalize(torch.rand(len(classes), 64))
            version.write(f".int8{CENTROIDS}", state_bytes(centroids))
        record = record_of(version, standin.NAME, classes, Decision(1.0, 1.1, food_at=-1.0))
        record = dataclasses.replace(record, forms={"int8": own} if with_int8 else {})
        version.write_record(record)
    return record


def record_of(
    version: NewVersion, model_name: str, classes: list[str], decision: Decision | None
) -> ModelRecord:
    return ModelRecord(
        format_version=FORMAT_VERSION,
        version=version.number,
        model_name=model_name,
        class_to_idx={name: i for i, name in enumerate(classes)},
        preprocessing=PreprocessConfig(**backbone(model_name).preprocessing),
        decision=decision or Decision(temperature=1.0, confident_at=0.5, food_at=-1.0),
        sha256=version.sha256,
        metrics={"top1": 0.5},
        training={"epochs": 1},
        libraries={"torch": torch.__version__},
        created=datetime.now(timezone.utc).isoformat(),
    )
