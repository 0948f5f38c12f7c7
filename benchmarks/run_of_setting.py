"""One training of accuracy.py: the command line, with values for fields that have no flag.

run_of_setting.py FIELDS_AS_JSON FLAGS...
"""

import dataclasses
import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "backend"))

import train_model
from app.ml.artifacts import ModelRecord
from training.commands.cli import run_command_line
from training.config import TrainingConfig


def train(config: TrainingConfig, command: str) -> ModelRecord | None:
    fields = json.loads(sys.argv[1])
    return train_model.train(dataclasses.replace(config, **fields), command)


if __name__ == "__main__":
    sys.exit(run_command_line(sys.argv[2:], __doc__, train, train_model.dry_run))
