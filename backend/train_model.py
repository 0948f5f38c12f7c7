"""Train a network to tell dishes apart, and release it for serving.

    python backend/train_model.py --sample --model_name efficientnet_lite0 --epochs 5
        a whole run on drawn plates: a few minutes on two CPU cores, nothing to download
    python backend/train_model.py --epochs 20 --model_name mobilenet_v2
        Food-101 (5 GB, downloaded once to data/): hours on a CPU, well under one on a GPU
    python backend/train_model.py --epochs 20 --model_name mobilenet_v2 --resume auto
        continues a run that was cut off, to the weights that it would have had
    python backend/train_model.py --predict lunch.jpg
        what the current model sees; for a folder, a table in predictions.csv
    python backend/train_model.py --compare v1 v2
        how two versions differ on the same test images
    python backend/train_model.py --audit
        photos whose labels look wrong, on a page to correct them in; --labels applies what it saves
    python backend/train_model.py --promote v2
        makes v2 the version that is served from now on

The model goes to ml-models/ (food_model_vN.pth, class_to_idx.json, model_config.json and a report),
what resuming needs to checkpoints/, and the history to metrics.jsonl there and to MLflow
(mlflow ui --backend-store-uri sqlite:///mlflow.db). MODEL_TRAINING_GUIDE.md explains each flag.
"""

# Read this from the bottom: `train` is the whole job, `fit` the epochs, `train_step` one update.

import contextlib
import dataclasses
import logging
import math
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from app.ml.artifacts import ModelRecord
from app.ml.model import (
    BACKBONES,
    TrainedPart,
    backbone,
    build_model,
    describe_split,
    split_model,
)
from training.commands.cli import run_command_line
from training.commands.console import ProgressBar, log_crops, log_data, log_epoch, log_settings
from training.compute.depthwise import float32_gradients
from training.compute.devices import (
    DTYPES,
    autocast,
    choose_device,
    choose_precision,
    prepare_machine,
    to_device,
)
from training.compute.distributed import Processes, join_processes, shared_gradients
from training.compute.features import FeatureBatch, FeatureSource, FrozenPart, feature_sources
from training.compute.fixed_norm import folded_batch_norm
from training.compute.frozen_int8 import int8_if_faster
from training.compute.memory import MicroBatch
from training.config import TrainingConfig
from training.data.loader import chosen_num_workers
from training.data.manifest import fingerprint
from training.data.splits import FoodData, load_food_data
from training.errors import ConfigError, TrainingError
from training.release.release import TrainingResult, release_model
from training.run.checkpointer import Checkpointer
from training.run.resume import find_checkpoint, recipe_then
from training.run.session import Session, check_folders, open_session
from training.run.start import copy_start, load_start, start_file
from training.run.state import EarlyStopping, Run, WeightAverage, file_sha256, plain_copy
from training.sample.generate import draw_sample

logger = logging.getLogger("nutrilearn")


# One update -----------------------------------------------------------------------------------


def train_step(run: Run, module: nn.Module, batch: FeatureBatch, processes: Processes) -> Tensor:
    """Update the weights from one batch.

    Nothing here waits for the device: the result is read when the progress bar or a checkpoint
    needs it.

    Returns (4,) on the device, of this process's share: the summed loss, the correct answers, the
    images, and whether the loss and the gradient are finite.
    """
    if processes.world_size == 1 and not len(batch.labels):  # none of its images could be read
        return torch.tensor([0.0, 0.0, 0.0, 1.0], device=batch.features.device)
    changing = () if run.config.is_pretrained else run.trained.buffers()  # of batch-norm
    buffers = [(buffer, buffer.clone()) for buffer in changing]

    def attempt() -> tuple[Tensor, Tensor]:
        for buffer, before in buffers:
            buffer.copy_(before)  # batch-norm must not count images that will be seen again
        return gradients(run, module, batch, processes)

    loss_sum, correct = run.micro_batch.attempt(attempt)
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.trained.parameters(), run.config.gradient_clip_max_norm)
    # In fp16 the scaler tries scales out: gradients that overflow are normal, and it skips them.
    is_finite = loss_sum.isfinite() & (norm.isfinite() | run.scaler.is_enabled())
    with warmed_up_rate(run):
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.average.update()
    count = loss_sum.new_full((), len(batch.labels))
    return torch.stack([loss_sum, correct, count, is_finite.float()])


def gradients(
    run: Run, module: nn.Module, batch: FeatureBatch, processes: Processes
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the mean loss over the whole batch, in parts that fit into memory.

    Returns the summed loss and the correct answers of this process's share, on the device.
    """
    run.optimizer.zero_grad(set_to_none=True)
    device = batch.features.device
    labels = to_device(batch.labels, device)  # (N,)
    masks = to_device(run.dropout_masks(batch.positions), device)  # (N, num_features)
    loss_sum, correct = torch.zeros(2, device=device).unbind()
    share = len(labels), batch.num_images
    for part in run.micro_batch.equal_parts(*share, processes.world_size):
        with autocast(batch.features):
            logits = module(batch.features[part], masks[part])  # (n, num_classes)
        loss = nn.functional.cross_entropy(
            logits.float(),
            labels[part],
            reduction="sum",
            label_smoothing=run.config.label_smoothing,
        )
        # DDP averages over the processes; the mean is meant to be over the images of all of them.
        run.scaler.scale(loss * (processes.world_size / batch.num_images)).backward()
        loss_sum += loss.detach()
        correct += (logits.argmax(dim=1) == labels[part]).sum()
    return loss_sum, correct


@contextlib.contextmanager
def warmed_up_rate(run: Run) -> Iterator[None]:
    """Inside, scale the learning rates by how far the linear warm-up has come.

    Adam's first steps have full length but follow the sign of a single batch's gradient; without
    the warm-up they cost 1.7 points of accuracy (docs/experiments.md). `run.average` counts the
    steps.
    """
    progress = min(1.0, (run.average.updates + 1) / max(run.warmup_steps, 1))
    rates = [group["lr"] for group in run.optimizer.param_groups]
    for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * progress
    try:
        yield
    finally:
        for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


# The epochs -----------------------------------------------------------------------------------


def fit(
    run: Run,
    train_batches: FeatureSource,
    val_batches: FeatureSource,
    session: Session,
    processes: Processes,
) -> None:
    """Train and validate, epoch after epoch, until the last one or early stopping."""
    frozen = train_batches.frozen
    with (
        faster_layers(run, frozen),
        shared_gradients(run.trained, processes) as module,
    ):
        while not run.is_done:
            began, waited = time.perf_counter(), train_batches.seconds_waiting
            train_loss, train_acc = train_epoch(
                run, module, train_batches, session.checkpointer, processes
            )
            waiting = train_batches.seconds_waiting - waited
            data_wait_share = waiting / (time.perf_counter() - began)
            val_loss, val_acc = validate_epoch(run, val_batches, session.checkpointer, processes)
            metrics = {
                "epoch": run.progress.epoch + 1,
                "train_loss": train_loss,
                "train_acc": train_acc,
                "val_loss": val_loss,
                "val_acc": val_acc,
                "learning_rate": run.learning_rate,
                "seconds": run.progress.seconds,
                "images_per_second": run.progress.count / run.progress.seconds,
                "data_wait_share": data_wait_share,
            }
            is_best = finish_epoch(run, metrics)
            session.end_epoch(metrics)
            log_epoch(metrics, run, is_best)


@contextlib.contextmanager
def faster_layers(run: Run, frozen: FrozenPart) -> Iterator[None]:
    """Inside, the trained part computes the same in less time, on a CPU."""
    is_fixed = run.config.is_pretrained and run.config.model_name in BACKBONES  # its batch-norm
    with (
        float32_gradients(run.trained, frozen.device, frozen.dtype),
        folded_batch_norm(run.trained, wanted=is_fixed and frozen.device.type == "cpu"),
    ):
        yield


def train_epoch(
    run: Run,
    module: nn.Module,
    batches: FeatureSource,
    checkpointer: Checkpointer,
    processes: Processes,
) -> tuple[float, float]:
    """Train on the rest of the current epoch.

    Returns the loss and the accuracy over all its images, those before a resume included.

    Raises:
        TrainingError: the loss is no longer finite, or no image could be read.
        Interrupted: a signal came; the checkpoint is written.
    """
    progress = run.progress
    run.train_mode()
    began = time.perf_counter()
    with ProgressBar(run, "train", batches, processes, progress.batch) as bar:
        epoch = batches.epoch(progress.epoch, progress.batch, on_batch=checkpointer.check)
        for batch in checkpointer.waiting_for(epoch):
            step = train_step(run, module, batch, processes)
            now = time.perf_counter()
            progress.add(step, now - began)
            began = now
            bar.update(batch.num_images)
            if checkpointer.check():
                bar.show(progress)
    checkpointer.check(is_last=True)
    if not progress.count:
        raise TrainingError("no training image could be read; see the log")
    return progress.loss_sum / progress.count, progress.correct / progress.count


@torch.no_grad()
def validate_epoch(
    run: Run, batches: FeatureSource, checkpointer: Checkpointer, processes: Processes
) -> tuple[float, float]:
    """Compute the loss and the accuracy of the averaged weights over the validation images.

    The loss is plain cross-entropy, without label smoothing, so it compares across settings.

    Raises: as `train_epoch`.
    """
    module, device = run.average.module.eval(), batches.frozen.device
    sums = torch.zeros(3, device=device)  # loss, correct answers, images
    with ProgressBar(run, "validate", batches, processes) as bar:
        for batch in checkpointer.waiting_for(batches.epoch(0, on_batch=checkpointer.check)):
            labels = to_device(batch.labels, device)
            logits = predict_logits(run, module, batch.features)
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            correct = (logits.argmax(dim=1) == labels).sum()
            sums += torch.stack([loss, correct, loss.new_full((), len(labels))])
            bar.update(batch.num_images)
            checkpointer.check()
    loss_sum, correct_sum, count = processes.sum(*sums.tolist())
    if not count:
        raise TrainingError("no validation image could be read; see the log")
    if not math.isfinite(loss_sum):
        raise checkpointer.not_finite("validation")
    return loss_sum / count, correct_sum / count


def predict_logits(run: Run, module: nn.Module, features: Tensor) -> Tensor:
    """Compute float32 (N, num_classes) from features (N, C, H, W)."""
    with autocast(features):
        logits = run.micro_batch.map(lambda part: module(features[part]), len(features))
    return logits.float()


def finish_epoch(run: Run, metrics: dict[str, float]) -> bool:
    """Reduce the rate if it is time, judge the epoch, keep the best weights; True if it is best."""
    run.lr_scheduler.step(metrics["val_loss"])
    is_best = run.early_stopping.judge(
        int(metrics["epoch"]), metrics["val_loss"], metrics["val_acc"]
    )
    if is_best:
        run.best_weights = plain_copy(run.average.module.state_dict())
    run.progress.finish_epoch(metrics)
    return is_best


# Setting a run up -----------------------------------------------------------------------------


def load_model(
    config: TrainingConfig, class_to_idx: Mapping[str, int], *, pretrained: bool
) -> tuple[nn.Module, nn.Module, TrainedPart]:
    """Build the network; return the whole, its frozen part and its trained part.

    pretrained: False where a checkpoint will be restored, which holds all weights.

    Raises:
        ConfigError: it has fewer layers than are to be frozen, or cannot be cut at all, or
            --weights vN is of another backbone.
        WeightsError, ArtifactError: the weights to start from are not available, or do not fit.
    """
    torch.manual_seed(config.seed)
    try:
        model = build_model(config.model_name, len(class_to_idx))
    except ValueError as error:  # a network of timm that cannot be cut
        raise ConfigError(f"--model_name {config.model_name}: {error}") from error
    origin = "weights of the checkpoint"
    if pretrained:
        origin = load_start(model, config, class_to_idx)
    num_layers = len(backbone(config.model_name).layers(model))
    freeze = num_layers if config.freeze_layers == "all" else int(config.freeze_layers)
    try:
        frozen, trained = split_model(model, config.model_name, freeze)
    except ValueError as error:
        raise ConfigError(f"--freeze_layers {freeze}: {error}") from error
    logger.info("%s, %s", config.model_name, origin)
    logger.info("%s", describe_split(model, config.model_name, freeze))
    return model, frozen, trained


def resolve(config: TrainingConfig, device: torch.device, num_images: int) -> TrainingConfig:
    """Replace `auto` and `on` by what they mean here. num_images: of the training split."""
    # The average looks back over two epochs: 0.98 at 25 steps an epoch, 0.9997 at Food-101's 1,894.
    steps_per_epoch = math.ceil(num_images / config.batch_size)
    automatic_decay = 1 - 1 / max(2 * steps_per_epoch, 2)
    decay = automatic_decay if config.ema_decay == "on" else float(config.ema_decay)
    return dataclasses.replace(
        config.with_sizes(config.sizes),
        precision=choose_precision(config.precision, device),
        num_workers=chosen_num_workers(config.num_workers, device),
        small_epochs=config.num_small_epochs,
        ema_decay=decay,
        # A small rate protects what pretraining gave; without pretraining it only slows learning.
        backbone_lr_scale=config.backbone_lr_scale if config.is_pretrained else 1.0,
    )


def build_run(
    config: TrainingConfig,
    data: FoodData,
    model: nn.Module,
    trained: TrainedPart,
    device: torch.device,
) -> Run:
    """Put everything together that training changes, at its beginning."""
    asked, config = config.exact_settings(), resolve(config, device, len(data.train))
    model.to(device).to(memory_format=torch.channels_last)
    groups = [{"params": list(trained.linear.parameters()), "lr": config.learning_rate}]
    if len(trained.layers):
        rate = config.learning_rate * config.backbone_lr_scale
        groups.append({"params": list(trained.layers.parameters()), "lr": rate})
    optimizer = torch.optim.Adam(groups, weight_decay=config.weight_decay, fused=True)
    steps_per_epoch = math.ceil(len(data.train) / config.batch_size)
    return Run(
        config=config,
        asked=asked,
        name=f"{config.model_name.replace('/', '-')}-{datetime.now():%Y%m%d-%H%M%S}-"
        f"{uuid.uuid4().hex[:4]}",
        model=model,
        trained=trained,
        average=WeightAverage(trained, float(config.ema_decay)),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer,
            patience=config.scheduler_patience,
            factor=config.scheduler_factor,
            threshold=0,  # any lower loss counts, as it does for early stopping
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        early_stopping=EarlyStopping(config.early_stopping_patience, len(data.val)),
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        data_fingerprint=fingerprint(data),
        micro_batch=MicroBatch(config.batch_size),
        weights_sha256=file_sha256(start_file(config)) or "",
    )


def build_sources(
    run: Run,
    data: FoodData,
    frozen: nn.Module,
    device: torch.device,
    run_dir: Path,
    processes: Processes,
    *,
    is_new: bool,
) -> tuple[FeatureSource, FeatureSource]:
    """Build what training and validation are fed from.

    is_new: the run may choose what its frozen layers compute in; a resumed one has chosen.
    """
    config, skipped = run.config, run.skipped
    dtype = DTYPES[config.precision]
    part = FrozenPart(frozen, config.preprocessing, device, dtype, run.micro_batch)
    if is_new and run.asked["precision"] == "auto":
        run.frozen_int8 = processes.from_main(
            lambda: int8_if_faster(frozen, part, config, data.train, skipped)
        )
    return feature_sources(config, data, part, run.frozen_int8, run_dir, processes, skipped)


def load_data(config: TrainingConfig) -> FoodData:
    """List the images, drawing the sample first if it is asked for."""
    data_dir = draw_sample(config.source_dir) if config.sample else config.source_dir
    data = load_food_data(
        data_dir,
        custom_data_dir=config.custom_data_dir,
        labels=config.labels,
        classes=config.classes,
        images_per_class=config.images_per_class,
        train_split=config.train_split,
        seed=config.seed if config.split_seed is None else config.split_seed,
    )
    log_data(data)
    return data


# The whole job --------------------------------------------------------------------------------


def train(config: TrainingConfig, command: str) -> ModelRecord | None:
    """Do the whole job, from the settings to the released version.

    Returns None in processes that only helped (rank above 0).
    """
    processes = join_processes(config.device)
    if not processes.is_main:
        logging.disable(logging.WARNING)
    device = choose_device(config.device, processes.local_rank)
    prepare_machine()
    log_settings(config)
    processes.from_main(lambda: check_folders(config))
    data = processes.from_main(lambda: load_data(config))
    checkpoint, data = processes.from_main(lambda: find_checkpoint(config, data))
    if checkpoint:
        config = dataclasses.replace(config, **recipe_then(checkpoint.state))

    model, frozen, trained = load_model(config, data.class_to_idx, pretrained=checkpoint is None)
    run = build_run(config, data, model, trained, device)
    run.name = processes.from_main(lambda: run.name)
    run.micro_batch.is_fixed = processes.world_size > 1
    if checkpoint:
        run.restore(checkpoint.state)
    log_crops(run.config)
    run_dir = checkpoint.path.parent if checkpoint else config.checkpoint_dir / run.name

    is_new = checkpoint is None
    sources = build_sources(run, data, frozen, device, run_dir, processes, is_new=is_new)
    with open_session(run, run_dir, data, checkpoint, device, processes, sources) as session:
        fit(run, *sources, session, processes)
        if not session.end_training():
            return None
        run.use_best_weights()
        released = release_model(run.model, data, training_result(run, command), device)
        session.finish(released)
    return released


def training_result(run: Run, command: str) -> TrainingResult:
    """Collect what the release says about the run that trained the model."""
    return TrainingResult(
        run_name=run.name,
        command=command,
        config=run.config,
        history=run.progress.history,
        best_epoch=run.early_stopping.best_epoch,
        stopped_early=run.early_stopping.should_stop,
        skipped=run.skipped,
        num_workers=int(run.config.num_workers),
        frozen_int8=len(run.frozen_int8) > 0,
    )


def dry_run(config: TrainingConfig, command: str) -> None:
    """Do the whole job, every file included, on a handful of images in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="nutrilearn-dry-run-") as folder:
        small = dataclasses.replace(
            config,
            images_per_class=min(config.images_per_class or 10, 10),
            epochs=1,
            no_mlflow=True,
            resume=None,
            output_dir=Path(folder) / "ml-models",
            checkpoint_dir=Path(folder) / "checkpoints",
            checkpoint_copy_dir=None,
        )
        copy_start(config, small.output_dir)
        if train(small, command):
            logger.info("dry run: data, training, test, release and reload work; nothing is kept")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command_line(argv, __doc__, load_data, train, dry_run)


if __name__ == "__main__":
    sys.exit(main())
