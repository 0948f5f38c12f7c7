"""What a run starts from: ImageNet, a file, or a released version, whose head grows."""

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from app.ml.artifacts import ModelRecord, read_record, read_state, record_name, weights_name
from app.ml.model import backbone, head_linear, load_pretrained
from training.config import TrainingConfig
from training.errors import ConfigError

logger = logging.getLogger(__name__)


def start_version(config: TrainingConfig) -> int | None:
    """Return N where --weights is vN."""
    match = re.fullmatch(r"v(\d+)", config.weights)
    return int(match[1]) if match else None


def start_file(config: TrainingConfig) -> Path:
    """Return the file that --weights names; one that does not exist where it is a word."""
    version = start_version(config)
    if version is None:
        return Path(config.weights)
    return config.output_dir / weights_name(version)


def load_start(model: nn.Module, config: TrainingConfig, class_to_idx: Mapping[str, int]) -> str:
    """Load what --weights names; return a line that says from where.

    Of a released version the head's part of each dish that is in the data is kept too.

    Raises:
        WeightsError: the weights are not available or do not fit.
        ArtifactError: the version is missing or damaged.
        ConfigError: the version has another backbone.
    """
    version = start_version(config)
    if version is None:
        return load_pretrained(model, config.model_name, config.weights)
    record = read_record(config.output_dir, version)
    if record.model_name != config.model_name:
        raise ConfigError(
            f"--weights v{version}: it is a {record.model_name}, not a {config.model_name}; add "
            f"--model_name {record.model_name}"
        )
    load_pretrained(model, config.model_name, str(start_file(config)))
    _keep_head(model, record, config, class_to_idx)
    known = record.class_to_idx.keys() & class_to_idx.keys()
    if lost := sorted(record.class_to_idx.keys() - known):
        logger.warning(
            "v%d knows dishes that the data lacks, and the new version will not know them: %s",
            version,
            ", ".join(lost),
        )
    return f"weights of v{version}: {len(known)} dishes kept, {len(class_to_idx) - len(known)} new"


def _keep_head(
    model: nn.Module, record: ModelRecord, config: TrainingConfig, class_to_idx: Mapping[str, int]
) -> None:
    state, head = read_state(config.output_dir, record), backbone(record.model_name).head
    linear = head_linear(model, record.model_name)
    with torch.no_grad():
        for name, index in class_to_idx.items():
            if (before := record.class_to_idx.get(name)) is not None:
                linear.weight[index] = state[f"{head}.weight"][before]
                linear.bias[index] = state[f"{head}.bias"][before]


def copy_start(config: TrainingConfig, output_dir: Path) -> None:
    """Copy the version that --weights names, if it is one, to where a dry run looks for it."""
    if (version := start_version(config)) is None:
        return
    read_record(config.output_dir, version)
    output_dir.mkdir(parents=True)
    for name in (weights_name(version), record_name(version)):
        shutil.copyfile(config.output_dir / name, output_dir / name)
