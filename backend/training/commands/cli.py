"""The command line: flags in, one of the commands run, errors told in one line, exit codes out."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from app.ml.artifacts import ArtifactError, ModelRecord
from app.ml.model import WeightsError
from app.ml.predictor import load_model_for_inference
from app.ml.preprocessing import ImageError
from training.commands.audit import audit_labels
from training.commands.average import Train, average_versions, train_and_average
from training.commands.compare import compare_versions
from training.commands.console import log_release
from training.commands.export import FORMATS, export_version
from training.commands.predict import Shard, predict_paths
from training.commands.promote import promote_version
from training.compute.devices import choose_device, prepare_machine
from training.compute.distributed import losses_explained
from training.compute.memory import is_out_of_memory
from training.config import (
    TrainingConfig,
    config_from_args,
    flag_names,
    make_parser,
)
from training.data.splits import FoodData
from training.errors import ConfigError, ReleaseError, TrainingError
from training.run.mlflow_sync import sync, sync_aliases
from training.run.signals import Interrupted
from training.shell import quoted
from training.uris import without_password

SCRIPT = ["python", "backend/train_model.py"]
SYNC_SECONDS = 120
KNOWN_ERRORS = (TrainingError, ArtifactError, WeightsError, ImageError, OSError)

logger = logging.getLogger(__name__)

DryRun = Callable[[TrainingConfig, str], None]
LoadData = Callable[[TrainingConfig], FoodData]


def run_command_line(
    argv: Sequence[str] | None,
    description: str | None,
    load_data: LoadData,
    train: Train,
    dry_run: DryRun,
) -> int:
    """Do what the arguments ask for.

    Returns the exit code: 0 done, 1 failed, 2 a bad flag, 128 + N stopped by signal N.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = make_cli(description)
    options = parser.parse_args(arguments)
    set_up_output()
    script = SCRIPT if argv is not None else started_as(len(arguments))
    try:
        config = config_from_args(options)
        check_options(options)
        command = shown([*script, *arguments])
        return run_command(options, config, command, load_data, train, dry_run)
    except ConfigError as error:
        parser.error(without_password(str(error)))
    except Interrupted as interrupted:
        is_kept = interrupted.can_resume and not config.dry_run
        hint = f"; resume with: {resume_command(script, arguments)}" if is_kept else ""
        logger.info("stopped by %s%s", interrupted, hint)
        return interrupted.exit_code
    except KeyboardInterrupt:
        logger.info("stopped before there was anything to save")
        return 130
    except ReleaseError as error:
        resume = resume_command(script, arguments)
        hint = "" if config.dry_run else f"; no retraining needed: {resume} evaluates and saves"
        logger.error("%s%s", without_password(str(error)), hint)
        return 1
    except KNOWN_ERRORS as error:
        logger.error("%s", without_password(str(error)))
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        logger.error("memory ran out; close other programs, or lower --batch_size or --num_workers")
        return 1


def run_command(
    options: argparse.Namespace,
    config: TrainingConfig,
    command: str,
    load_data: LoadData,
    train: Train,
    dry_run: DryRun,
) -> int:
    """Run the one command that the options name; training is the default."""
    if options.sync_mlflow:
        return sync_run(Path(options.sync_mlflow), options.tracking_uri)
    if options.predict:
        return predict(options, config)
    if options.compare:
        logger.info("comparison %s", compare_versions(config.output_dir, *options.compare))
    elif options.audit:
        logger.info("audit    %s", audit_labels(config, load_data(config)))
    elif options.promote is not None:
        promote_version(config.output_dir, options.promote)
        follow_in_mlflow(options, config)
    elif options.export is not None:
        logger.info("files %s", export_version(config, options.export, options.format))
    elif config.dry_run:
        dry_run(config, command)
    elif released := new_version(options, config, command, train):
        log_release(released, config)
    return 0


def new_version(
    options: argparse.Namespace, config: TrainingConfig, command: str, train: Train
) -> ModelRecord | None:
    """Release what the options ask for: a trained model, or the mean of several."""
    if options.average:
        return average_versions(config, options.average, command, options.tracking_uri)
    if config.runs > 1:
        return train_and_average(train, config, command)
    return train(config, command)


def version_number(text: str) -> int:
    """Parse "N" or "vN"."""
    digits = text.removeprefix("v")
    if not (digits.isascii() and digits.isdigit()):
        raise argparse.ArgumentTypeError(f"{text}: must be a version, such as 3 or v3")
    return int(digits)


def shard(text: str) -> Shard:
    """Parse "I/N"."""
    index, _, count = text.partition("/")
    numbers = [int(n) if n.isascii() and n.isdigit() else -1 for n in (index, count)]
    if not 0 <= numbers[0] < numbers[1]:
        raise argparse.ArgumentTypeError(
            f"{text}: must be I/N with I from 0 to N-1, such as 0/8 for the first of eight shares"
        )
    return Shard(*numbers)


VERSION: dict[str, Any] = {"type": version_number, "metavar": "VERSION"}
# The flags that use a model rather than train one, as argparse takes them.
USING: dict[str, dict[str, Any]] = {
    "predict": {
        "nargs": "+",
        "metavar": "PATH",
        "help": "say what is on these pictures, or on all pictures in these folders (a table in "
        "predictions.csv)",
    },
    "top_k": {"type": int, "default": 3, "help": "answers per picture (3)"},
    "shard": {
        "type": shard,
        "metavar": "SHARD",
        "help": "predict only this share of the pictures, I/N with I from 0 to N-1, each on a "
        "machine (a table in predictions-I-of-N.csv)",
    },
    "model_version": VERSION | {"help": "the version to use (default: the current one)"},
    "compare": VERSION
    | {
        "nargs": 2,
        "help": "how the second version differs from the first on the test images of both",
    },
    "audit": {
        "action": "store_true",
        "help": "list the photos whose labels look wrong, to correct them in a page",
    },
    "promote": VERSION
    | {"help": "make this version, newer or older, the current one, which servers load"},
    "average": VERSION
    | {
        "nargs": "+",
        "help": "release the mean of the weights of those of these versions that improve it",
    },
    "export": VERSION
    | {"help": "write this version for other runtimes, into exports/ in the folder of the model"},
    "format": {
        "choices": list(FORMATS),
        "metavar": "FORMAT",
        "help": f"of --export: {', '.join(FORMATS)}",
    },
    "sync_mlflow": {
        "metavar": "RUN_DIR",
        "help": "bring MLflow up to date with a run's record (--tracking_uri: in this store)",
    },
}


def make_cli(description: str | None) -> argparse.ArgumentParser:
    """The flags of TrainingConfig, and those of `USING`."""
    parser = make_parser(description)
    using = parser.add_argument_group("using a model")
    for name, options in USING.items():
        using.add_argument(*flag_names(name), **options)
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that are wrong in themselves or together."""
    if options.top_k < 1:
        raise ConfigError(f"--top_k {options.top_k}: must be a whole number, 1 or more")
    if options.shard and not options.predict:
        raise ConfigError(f"--shard {options.shard}: goes with --predict")
    commands = ("predict", "compare", "audit", "promote", "average", "export", "sync_mlflow")
    asked = [f"--{name}" for name in commands if getattr(options, name) not in (None, False)]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)}: one at a time")
    if options.dry_run and asked:  # it would not be one: --promote promotes
        raise ConfigError(f"--dry_run with {asked[0]}: only training has a dry run; leave it out")
    if (options.export is None) != (options.format is None):
        raise ConfigError(f"--export VERSION and --format ({', '.join(FORMATS)}) go together")


def set_up_output() -> None:
    """Log to stderr, and let no character stop a line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console may not encode every character
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it logs its font cache


def predict(options: argparse.Namespace, config: TrainingConfig) -> int:
    """Say what a released model sees on pictures; the exit code."""
    prepare_machine()
    device = choose_device(config.device, 0)
    model = load_model_for_inference(config.output_dir, options.model_version, device)
    with losses_explained(hint=""):
        return predict_paths(
            model,
            options.predict,
            top_k=options.top_k,
            device=device,
            num_workers=config.num_workers,
            shard=options.shard,
        )


def sync_run(run_dir: Path, tracking_uri: str | None) -> int:
    """Sync MLflow with a run's record; 0 if it is in sync."""
    result = sync(run_dir, deadline_seconds=SYNC_SECONDS, tracking_uri=tracking_uri)
    logger.info("%s", result.message)
    return 0 if result.in_sync else 1


def follow_in_mlflow(options: argparse.Namespace, config: TrainingConfig) -> None:
    """Let MLflow's aliases follow the current version; that it cannot is one line."""
    if config.no_mlflow:
        return
    if result := sync_aliases(config.output_dir, options.tracking_uri):
        logger.info("%s", result.message)


# Commands as they are printed -----------------------------------------------------------------


def started_as(num_arguments: int) -> list[str]:
    """The words before this process's arguments, with torchrun if it started the process."""
    words = sys.orig_argv[: len(sys.orig_argv) - num_arguments]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return [Path(words[0]).name, *words[1:]] if words else SCRIPT
    options = [f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', '1')}"]
    local, world = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    if local != world:
        options.append(f"--nnodes={os.environ.get('GROUP_WORLD_SIZE', '1')}")
    return ["torchrun", *options, sys.argv[0]]


def resume_command(script: Sequence[str], arguments: Sequence[str]) -> str:
    """The command that continues where the one with these arguments stopped."""
    kept = [argument for argument in arguments if not argument.startswith("--resume=")]
    if "--resume" in kept:
        at = kept.index("--resume")
        del kept[at : at + 2]
    return shown([*script, *kept, "--resume", "auto"])


def shown(command: Sequence[str]) -> str:
    """Quote a command for the shell that people have here; passwords are masked."""
    return without_password(quoted(command))
