"""Train a network to tell dishes apart, and release it for serving.

    python backend/train_model.py --sample --model_name efficientnet_lite0 --epochs 5
        a few minutes on two CPU cores, nothing to download: drawn plates, a whole run
    python backend/train_model.py --epochs 20 --model_name mobilenet_v2
        Food-101 (5 GB, downloaded once to data/): hours on a CPU, well under one on a GPU
    python backend/train_model.py --epochs 20 --model_name mobilenet_v2 --resume auto
        the same command goes on where it was cut off, to the same weights
    python backend/train_model.py --predict lunch.jpg
        what the newest model sees; for a folder, a table in predictions.csv
    python backend/train_model.py --compare v1 v2
        two versions on the same test images

The model goes to ml-models/ (food_model_vN.pth, class_to_idx.json, model_config.json and a report),
what resuming needs to checkpoints/, and the history to metrics.jsonl there and to MLflow
(mlflow ui --backend-store-uri sqlite:///mlflow.db). MODEL_TRAINING_GUIDE.md explains each flag.
"""

import argparse
import contextlib
import dataclasses
import io
import logging
import math
import shlex
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from app.ml.artifacts import (
    ArtifactError,
    ModelRecord,
    SaveError,
    report_folder_name,
    weights_name,
)
from app.ml.model import (
    WeightsError,
    backbone,
    build_model,
    describe_split,
    load_pretrained,
    split_model,
)
from app.ml.predictor import load_model_for_inference
from app.ml.preprocessing import ImageError
from training.compute.depthwise import float32_gradients
from training.compute.devices import choose_device, choose_dtype, reuse_freed_memory
from training.compute.distributed import Processes, join_processes, shared_gradients
from training.compute.features import FeatureSource, feature_sources
from training.config import (
    TrainingConfig,
    config_from_args,
    flag_names,
    make_parser,
    without_password,
)
from training.data.splits import FoodData, load_food_data
from training.errors import CheckpointError, ConfigError, DataError, TrainingError
from training.release.release import TrainingResult, release_model
from training.run.record import RunRecord
from training.run.recording import recorded
from training.run.resume import Interrupted, Keeper, data_of_run, find_checkpoint, mark_finished
from training.run.state import (
    MicroBatch,
    Run,
    Verdict,
    WeightAverage,
    fingerprint,
    pack_data,
    plain_copy,
)
from training.sample.generate import draw_sample
from training.step import autocast, train_step

SYNC_SECONDS = 120
GOES_ON = "; --resume auto goes on from the last checkpoint"
SLOW_DATA_SHARE = 0.10  # above this share of waiting for images, the epoch line says what helps

KNOWN_ERRORS = (DataError, WeightsError, CheckpointError, ArtifactError, ImageError)

logger = logging.getLogger("nutrilearn")


# The loop -------------------------------------------------------------------------------------


def fit(
    run: Run,
    train: FeatureSource,
    val: FeatureSource,
    keeper: Keeper,
    record: RunRecord,
    processes: Processes,
) -> None:
    """Train and validate, epoch after epoch, until the verdict or the last epoch ends it."""
    with contextlib.ExitStack() as stack:
        frozen = train.frozen
        stack.enter_context(float32_gradients(run.trained, frozen.device, frozen.dtype))
        step_module = stack.enter_context(shared_gradients(run.trained, processes))
        while not run.is_done:
            began, waited = time.perf_counter(), train.seconds_waiting
            train_loss, train_acc = train_epoch(run, step_module, train, keeper, processes)
            waiting = (train.seconds_waiting - waited) / (time.perf_counter() - began)
            val_loss, val_acc = validate_epoch(run, val, keeper, processes)
            _check_finite(val_loss, "validation", run, keeper)
            metrics = {
                "epoch": run.progress.epoch + 1,
                "train_loss": train_loss,
                "train_acc": train_acc,
                "val_loss": val_loss,
                "val_acc": val_acc,
                "learning_rate": run.optimizer.param_groups[0]["lr"],
                "seconds": run.progress.seconds,
                "images_per_second": run.progress.count / run.progress.seconds,
                "data_wait_share": waiting,
            }
            is_best = finish_epoch(run, metrics)
            keeper.save()
            record.epoch(metrics)
            log_epoch(metrics, run, is_best)


def finish_epoch(run: Run, metrics: dict[str, float]) -> bool:
    """Lower the rate if it is time, judge the epoch, keep the best weights; True if it is best."""
    run.lr_scheduler.step(metrics["val_loss"])
    is_best = run.verdict.judge(int(metrics["epoch"]), metrics["val_loss"], metrics["val_acc"])
    if is_best:
        run.best_weights = plain_copy(run.average.module.state_dict())
    run.progress.finish_epoch(metrics)
    return is_best


def train_epoch(
    run: Run,
    step_module: nn.Module,
    source: FeatureSource,
    keeper: Keeper,
    processes: Processes,
) -> tuple[float, float]:
    """The rest of the current epoch; returns loss and accuracy over all its images so far."""
    progress = run.progress
    run.train_mode()
    seed, began = run.config.seed, time.perf_counter()
    for _ in source.prepare(progress.epoch, shuffle_seed=seed):
        keeper.check()
    batches = source.batches(progress.epoch, progress.batch, shuffle_seed=seed)
    with _progress_bar(source, run, "train", processes) as bar:
        for batch in batches:
            loss_sum, correct = train_step(run, step_module, batch, processes)
            loss_sum, hits, count = processes.sum(loss_sum, correct, len(batch.labels))
            _check_finite(loss_sum, f"batch {progress.batch + 1}", run, keeper)
            now = time.perf_counter()
            progress.add(loss_sum, hits, count, now - began)
            began = now
            bar.update()
            bar.set_postfix(
                loss=f"{progress.loss_sum / max(progress.count, 1):.3f}",
                acc=f"{progress.correct / max(progress.count, 1):.3f}",
            )
            keeper.check()
    if not progress.count:
        raise TrainingError("not one training image could be read; the log names them")
    return progress.loss_sum / progress.count, progress.correct / progress.count


def _check_finite(loss: float, step: str, run: Run, keeper: Keeper) -> None:
    if math.isfinite(loss):
        return
    raise TrainingError(
        f"the loss is not finite any more at epoch {run.progress.epoch + 1}, {step}, learning rate "
        f"{run.optimizer.param_groups[0]['lr']:g}; try a lower --learning_rate or --precision "
        f"fp32. The last good checkpoint: {keeper.last_good or 'none yet'}"
    )


@torch.no_grad()
def validate_epoch(
    run: Run, source: FeatureSource, keeper: Keeper, processes: Processes
) -> tuple[float, float]:
    """Loss and accuracy of the averaged weights over the validation images."""
    module, device = run.average.module.eval(), source.frozen.device
    loss_sum, correct, count = 0.0, 0, 0
    for _ in source.prepare(0):
        keeper.check()
    with _progress_bar(source, run, "validate", processes) as bar:
        for batch in source.batches(0):
            labels = batch.labels.to(device)
            with autocast(batch.features):
                logits = _logits(run, module, batch.features)
            loss_sum += nn.functional.cross_entropy(logits.float(), labels, reduction="sum").item()
            correct += int((logits.argmax(dim=1) == labels).sum())
            count += len(labels)
            bar.update()
            keeper.check()
    loss_sum, correct_sum, count_sum = processes.sum(loss_sum, correct, count)
    if not count_sum:
        raise TrainingError("not one validation image could be read; the log names them")
    return loss_sum / count_sum, correct_sum / count_sum


def _logits(run: Run, module: nn.Module, features: Tensor) -> Tensor:
    return run.micro_batch.map(lambda part: module(features[part]), len(features))


def _progress_bar(source: FeatureSource, run: Run, verb: str, processes: Processes) -> Any:
    return tqdm(
        total=len(source),
        initial=run.progress.batch if verb == "train" else 0,
        desc=f"epoch {run.progress.epoch + 1}/{run.config.epochs} {verb}",
        unit_scale=run.config.batch_size,
        unit=" images",
        leave=False,
        disable=None if processes.is_main else True,  # None: only where a person looks on
    )


def log_epoch(metrics: dict[str, float], run: Run, is_best: bool) -> None:
    """One aligned line per epoch."""
    logger.info(
        "epoch %*d/%d  train loss %.4f acc %.4f  val loss %.4f acc %.4f  lr %-8.3g"
        "%6.1f images/s  data wait %2.0f %%%s",
        len(str(run.config.epochs)),
        metrics["epoch"],
        run.config.epochs,
        metrics["train_loss"],
        metrics["train_acc"],
        metrics["val_loss"],
        metrics["val_acc"],
        metrics["learning_rate"],
        metrics["images_per_second"],
        100 * metrics["data_wait_share"],
        "  best" if is_best else "",
    )
    if metrics["epoch"] > 1 and metrics["data_wait_share"] > SLOW_DATA_SHARE:
        logger.info(
            "much of the time goes into waiting for images; raise --num_workers (now %s)%s",
            run.config.num_workers,
            "" if run.config.cache_images == "on" else " or set --cache_images on",
        )
    if run.verdict.should_stop:
        patience = run.config.early_stopping_patience
        logger.info("early stop: no lower validation loss for %d epochs", patience)


# Setting a run up -----------------------------------------------------------------------------


def build_run(
    config: TrainingConfig, data: FoodData, device: torch.device, *, pretrained: bool = True
) -> tuple[Run, nn.Module]:
    """The network with all that trains it, and its frozen layers.

    pretrained: False where a checkpoint will be restored, which holds all weights.
    """
    torch.manual_seed(config.seed)
    model = build_model(config.model_name, len(data.class_to_idx))
    origin = "weights of the checkpoint"
    if pretrained:
        origin = load_pretrained(model, config.model_name, config.weights)
    num_layers = len(backbone(config.model_name).layers(model))
    freeze = num_layers if config.freeze_layers == "all" else int(config.freeze_layers)
    try:
        frozen, trained = split_model(model, config.model_name, freeze)
    except ValueError as error:
        raise ConfigError(f"--freeze_layers {freeze}: {error}") from error
    logger.info("%s, %s", config.model_name, origin)
    logger.info("%s", describe_split(model, config.model_name, freeze))
    model.to(device).to(memory_format=torch.channels_last)
    rate = config.learning_rate
    groups = [{"params": list(trained.linear.parameters()), "lr": rate}]
    if len(trained.layers):
        share = 1.0 if config.weights == "none" else config.backbone_rate
        groups.append({"params": list(trained.layers.parameters()), "lr": rate * share})
    optimizer = torch.optim.Adam(groups, weight_decay=config.weight_decay, fused=True)
    # A horizon of two epochs: 0.98 at 25 steps an epoch, 0.9997 at Food-101's 1,894.
    steps_per_epoch = -(-len(data.train) // config.batch_size)
    automatic = 1 - 1 / max(2 * steps_per_epoch, 2)
    decay = automatic if config.ema_decay == "on" else float(config.ema_decay)
    run = Run(
        config=config,
        name=f"{config.model_name}-{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}",
        model=model,
        trained=trained,
        average=WeightAverage(trained, decay),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer,
            patience=config.scheduler_patience,
            factor=config.scheduler_factor,
            threshold=0,  # any lower loss counts, as it does for the verdict
        ),
        scaler=torch.amp.GradScaler(
            device.type, enabled=choose_dtype(config.precision, device) == torch.float16
        ),
        verdict=Verdict(config.early_stopping_patience),
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        data_fingerprint=fingerprint(data),
        packed_data=pack_data(data),
        micro_batch=MicroBatch(config.batch_size),
    )
    return run, frozen


# The whole job --------------------------------------------------------------------------------


def train(config: TrainingConfig, command: str) -> ModelRecord | None:
    """Data, model, fit, test, release: from the flags to the released version.

    Returns None on processes that only helped (rank above 0).
    """
    processes = join_processes(choose_device(config.device, 0).type)
    if not processes.is_main:
        logging.disable(logging.WARNING)
    device = choose_device(config.device, processes.local_rank)
    log_settings(config)
    reuse_freed_memory()
    data = processes.from_main(lambda: load_data(config))
    checkpoint = processes.from_main(lambda: find_checkpoint(config, data))
    if checkpoint:
        data = data_of_run(checkpoint, data)
    run, frozen = build_run(config, data, device, pretrained=checkpoint is None)
    run.name = processes.from_main(lambda: run.name)
    if checkpoint:
        run.restore(checkpoint.state)
    run_dir = checkpoint.path.parent if checkpoint else config.checkpoint_dir / run.name
    train_source, val_source = feature_sources(
        config, data, frozen, run_dir, device, processes, run.micro_batch
    )
    train_source.loader.left_out = val_source.loader.left_out = run.left_out
    with contextlib.closing(Keeper(run, run_dir, processes, checkpoint)) as keeper:
        with recorded(run, run_dir, checkpoint, device, processes) as ending:
            with (
                lost_process_explained(processes, GOES_ON),
                contextlib.closing(train_source),
                contextlib.closing(val_source),
            ):
                fit(run, train_source, val_source, keeper, ending.record, processes)
            left_out = processes.merged(run.left_out)
            processes.leave()
            if not processes.is_main:
                return None
            keeper.stop.raise_from_now()
            run.trained.load_state_dict(run.best_weights)
            result = TrainingResult(
                run_name=run.name,
                command=command,
                config=config,
                history=run.progress.history,
                best_epoch=run.verdict.best_epoch,
                stopped_early=run.verdict.should_stop,
                skipped=left_out,
                num_workers=train_source.loader.num_workers,
            )
            with lost_process_explained(Processes(), GOES_ON):
                released = release_model(run.model, data, result, device)
            ending.finish(released)
        mark_finished(run_dir, run, released.version)  # only when the record has its end too
    return released


@contextlib.contextmanager
def lost_process_explained(processes: Processes, hint: str = "") -> Iterator[None]:
    """Turn what torch raises, anywhere, when another process dies into a TrainingError."""
    try:
        yield
    except RuntimeError as error:
        line = (str(error).splitlines() or [""])[0]
        if "DataLoader worker" in str(error):
            raise TrainingError(
                f"a process that reads images died ({line}); if memory is short, lower "
                f"--num_workers{hint}"
            ) from error
        if processes.world_size > 1 and not isinstance(error, (TrainingError, *KNOWN_ERRORS)):
            raise TrainingError(
                f"the processes of this run lost each other ({line}){hint}"
            ) from error
        raise


def load_data(config: TrainingConfig) -> FoodData:
    """List the images, drawing the sample first if it is asked for; says what was found."""
    data_dir = draw_sample(config.data_dir / "sample") if config.sample else config.data_dir
    data = load_food_data(
        data_dir,
        custom_data_dir=config.custom_data_dir,
        classes=config.classes,
        images_per_class=config.images_per_class,
        train_split=config.train_split,
        seed=config.seed,
    )
    for note in data.notes:
        logger.info("%s", note)
    return data


def log_settings(config: TrainingConfig) -> None:
    """The configuration, a line per group."""
    groups: dict[str, list[str]] = {}
    for setting in dataclasses.fields(config):
        value = config.to_dict()[setting.name]
        groups.setdefault(setting.metadata["group"], []).append(f"{setting.name}={value}")
    for group, settings in groups.items():
        logger.info("%-8s %s", group, " ".join(settings))


def log_release(released: ModelRecord, config: TrainingConfig) -> None:
    """What was reached, and where it is."""
    metrics, folder = released.metrics, config.output_dir
    low, high = metrics["test_top1_ci95"]
    report = folder / report_folder_name(released.version)
    logger.info(
        "test top-1 %.4f (95 %% interval %.3f to %.3f)  top-5 %.4f  on %d images; best epoch %d",
        metrics["test_top1"],
        low,
        high,
        metrics["test_top5"],
        metrics["test_images"],
        metrics["best_epoch"],
    )
    logger.info("model    %s (now current)", folder / weights_name(released.version))
    logger.info("report   %s", report / "report.html")


# Other commands -------------------------------------------------------------------------------


def dry_run(config: TrainingConfig, command: str) -> None:
    """The whole job, with every file, on a handful of images in a folder that is then removed."""
    with tempfile.TemporaryDirectory(prefix="nutrilearn-dry-run-") as folder:
        small = dataclasses.replace(
            config,
            images_per_class=min(config.images_per_class or 10, 10),
            epochs=1,
            no_mlflow=True,
            resume=None,
            output_dir=Path(folder) / "ml-models",
            checkpoint_dir=Path(folder) / "checkpoints",
        )
        released = train(small, command)
    if released:
        logger.info("dry run: data, training, test, release and reload all work; nothing is kept")


def predict(options: argparse.Namespace, config: TrainingConfig) -> int:
    """Say what a released model sees on pictures; the exit code."""
    from training.commands.predict import predict_paths

    device = choose_device(config.device, 0)
    model = load_model_for_inference(config.output_dir, options.model_version, device)
    with lost_process_explained(Processes()):
        return predict_paths(
            model,
            options.predict,
            top_k=options.top_k,
            csv_path=options.predictions,
            device=device,
            num_workers=config.num_workers,
        )


def compare(versions: Sequence[int], config: TrainingConfig) -> None:
    """Print and draw how two released versions differ on the images both were tested on."""
    from training.commands.compare import compare_versions

    page = compare_versions(config.output_dir, *versions)
    logger.info("comparison %s", page)


def sync_command(run_dir: Path) -> int:
    """Bring MLflow level with a run's record; 0 if it is."""
    from training.run.mlflow_mirror import sync  # imports mlflow, which training itself never does

    result = sync(run_dir, deadline_seconds=SYNC_SECONDS)
    logger.info("%s", result.message)
    return 0 if result.level else 1


def make_cli() -> argparse.ArgumentParser:
    """The flags of TrainingConfig, and those that use a model rather than train one."""
    parser = make_parser(__doc__)
    using = parser.add_argument_group("using it")
    using.add_argument(
        "--predict",
        nargs="+",
        metavar="PATH",
        help="say what is on these pictures, or on all pictures in these folders",
    )
    using.add_argument(
        "--predictions",
        type=Path,
        metavar="CSV",
        help="write the answers to this file (default: predictions.csv; for folders)",
    )
    using.add_argument(*flag_names("top_k"), type=int, default=3, help="answers per picture (3)")
    using.add_argument(
        *flag_names("model_version"), type=int, help="the version to use (default: the newest)"
    )
    using.add_argument(
        "--compare",
        nargs=2,
        type=version_number,
        metavar="VERSION",
        help="how the second version differs from the first on the images both were tested on",
    )
    using.add_argument(
        *flag_names("sync_mlflow"), metavar="RUN_DIR", help="bring MLflow level with a run's record"
    )
    return parser


def version_number(text: str) -> int:
    """The N of "N" or "vN"."""
    digits = text.removeprefix("v")
    if not (digits.isascii() and digits.isdigit()):
        raise argparse.ArgumentTypeError(f"{text}: must be a version, such as 3 or v3")
    return int(digits)


def resume_command(arguments: list[str]) -> str:
    """The command that goes on where the one with these arguments stopped."""
    kept = [argument for argument in arguments if not argument.startswith("--resume=")]
    if "--resume" in kept:
        at = kept.index("--resume")
        del kept[at : at + 2]
    return shlex.join(["python", "backend/train_model.py", *kept, "--resume", "auto"])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 it could not be done, 2 a bad flag, 130 and 143 signals."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = make_cli()
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a redirected Windows console knows few letters
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its font cache
    command = without_password(shlex.join(["python", "backend/train_model.py", *arguments]))
    try:
        config = config_from_args(options)
        if options.top_k < 1:
            raise ConfigError(f"--top_k {options.top_k}: must be a whole number, 1 or more")
        if options.predictions and not options.predict:
            raise ConfigError("--predictions: goes with --predict and its pictures")
        if options.predict and options.compare:
            raise ConfigError("--predict and --compare: one at a time")
        if options.sync_mlflow:
            return sync_command(Path(options.sync_mlflow))
        if options.predict:
            return predict(options, config)
        if options.compare:
            compare(options.compare, config)
        elif config.dry_run:
            dry_run(config, command)
        elif released := train(config, command):
            log_release(released, config)
    except ConfigError as error:
        parser.error(str(error))
    except Interrupted as signal_received:
        logger.info("stopped by %s; go on with: %s", signal_received, resume_command(arguments))
        return signal_received.exit_code
    except KeyboardInterrupt:
        logger.info("stopped before there was anything to save")
        return 130
    except SaveError as error:
        logger.error(
            "%s; nothing needs training again: %s only tests and saves",
            error,
            resume_command(arguments),
        )
        return 1
    except (*KNOWN_ERRORS, TrainingError, OSError) as error:
        logger.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
