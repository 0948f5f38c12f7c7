"""Released models for the tests that load, serve and compare them."""

from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import nn

from app.ml.artifacts import (
    CENTROIDS,
    FORMAT_VERSION,
    WEIGHTS,
    Decision,
    ModelRecord,
    NewVersion,
    new_version,
    state_bytes,
)
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


def release_model(
    output_dir: Path,
    classes: list[str],
    model_name: str = "mobilenet_v2",
    seed: int = 0,
    decision: Decision | None = None,
    model: nn.Module | None = None,
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
