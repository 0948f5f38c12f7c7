"""One training of accuracy.py: the command line, with values for fields that have no flag.

run_of_setting.py "FIELD=VALUE FIELD=VALUE" FLAGS...
"""

import dataclasses
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "backend"))

import train_model
from app.ml.artifacts import ModelRecord, read_record
from training.commands.cli import run_command_line
from training.config import TrainingConfig
from training.run.resume import finished_version


def parse_fields(pairs: Iterable[str]) -> dict[str, Any]:
    """Read values for fields of TrainingConfig.

    Raises:
        ValueError: no such field, or a value that it does not take.
    """
    known, fields = {f.name: f for f in dataclasses.fields(TrainingConfig)}, {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in known:
            raise ValueError(f"TrainingConfig has no field {name!r}")
        fields[name] = known[name].metadata["type"].parse(value)
    return fields


def train(config: TrainingConfig, command: str) -> ModelRecord | None:
    changed = dataclasses.replace(config, **parse_fields(shlex.split(sys.argv[1])))
    # With --runs, the one who asks for a run does not know these fields, by which it is found.
    version = finished_version(changed) if config.resume else None
    if version is None:
        return train_model.train(changed, command)
    return read_record(changed.output_dir, version)


if __name__ == "__main__":
    commands = train_model.load_data, train, train_model.dry_run
    sys.exit(run_command_line(sys.argv[2:], __doc__, *commands))
