"""What a person sees while a run trains: log lines and progress bars."""

import dataclasses
import itertools
import logging
from typing import Any

from tqdm import tqdm

from app.ml.artifacts import ModelRecord, current_version, report_folder_name, weights_name
from training.compute.distributed import Processes
from training.compute.features import FeatureSource
from training.config import TrainingConfig
from training.data.splits import FoodData
from training.run.state import Progress, Run

SLOW_DATA_SHARE = 0.10  # above this share of waiting for images, a line says what to change

logger = logging.getLogger(__name__)


def log_settings(config: TrainingConfig) -> None:
    """Log the configuration, a line per group."""
    values, groups = config.to_dict(), dict[str, list[str]]()
    for setting in dataclasses.fields(config):
        groups.setdefault(setting.metadata["group"], []).append(
            f"{setting.name}={values[setting.name]}"
        )
    for group, settings in groups.items():
        logger.info("%-8s %s", group, " ".join(settings))


def log_crops(config: TrainingConfig) -> None:
    """Log how large training pictures are in which epochs, if they grow."""
    begins = [epoch for epoch in config.crops if epoch < config.epochs]
    if len(begins) > 1:
        pairs = itertools.pairwise([*begins, config.epochs])
        parts = [f"{config.crops[begin]} in {end - begin}" for begin, end in pairs]
        logger.info("training pictures grow; pixels in epochs: %s", ", ".join(parts))


def log_data(data: FoodData) -> None:
    """Log what was found in the data folder."""
    for note in data.notes:
        logger.info("%s", note)


class ProgressBar:
    """A bar over the batches of an epoch, on a terminal only; it counts images."""

    def __init__(
        self, run: Run, verb: str, source: FeatureSource, processes: Processes, start: int = 0
    ) -> None:
        total = source.order.num_images
        self._bar = tqdm(
            total=total,
            initial=min(start * run.config.batch_size, total),
            desc=f"epoch {run.progress.epoch + 1}/{run.config.epochs} {verb}",
            unit=" images",
            unit_scale=True,
            leave=False,
            disable=None if processes.is_main else True,  # None: on a terminal only
        )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, num_images: int) -> None:
        self._bar.update(num_images)

    def show(self, progress: Progress) -> None:
        """Show the mean loss and the accuracy of the epoch so far."""
        count = max(progress.count, 1)
        self._bar.set_postfix(
            loss=f"{progress.loss_sum / count:.3f}", acc=f"{progress.correct / count:.3f}"
        )


def log_epoch(metrics: dict[str, Any], run: Run, is_best: bool) -> None:
    """Log an aligned line per epoch, and what to do about it."""
    logger.info(
        "epoch %*d/%d  train loss %.4f acc %.4f  val loss %.4f acc %.4f  lr %-8.3g"
        "%6.1f images/s  data wait %2.0f%%%s",
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
    is_slow = metrics["epoch"] > 1 and metrics["data_wait_share"] > SLOW_DATA_SHARE
    if is_slow and (remedies := remedies_for_slow_data(run)):
        logger.info("the loader is the bottleneck; %s", " or ".join(remedies))
    if run.early_stopping.should_stop:
        patience = run.config.early_stopping_patience
        logger.info("early stopping: no lower validation loss for %d epochs", patience)


def remedies_for_slow_data(run: Run) -> list[str]:
    """List what would help; not more workers, where all cores read and then compute."""
    remedies, num_workers = [], run.config.num_workers
    if num_workers or run.trained.linear.weight.device.type != "cpu":
        remedies.append(f"raise --num_workers (now {num_workers})")
    if run.config.cache_images == "off":
        remedies.append("set --cache_images on")
    return remedies


def log_release(released: ModelRecord, config: TrainingConfig) -> None:
    """Log what was reached, and where it is."""
    metrics, folder = released.metrics, config.output_dir
    low, high = metrics["test_top1_ci95"]
    balanced = f"{metrics['test_balanced_accuracy']:.4f}"
    logger.info(
        "test top-1 %.4f (95%% interval %.3f to %.3f)%s  top-5 %.4f  on %d images%s",
        metrics["test_top1"],
        low,
        high,
        "" if balanced == f"{metrics['test_top1']:.4f}" else f"  balanced {balanced}",
        metrics["test_top5"],
        metrics["test_images"],
        f"; best epoch {metrics['best_epoch']}" if "best_epoch" in metrics else "",
    )
    current = current_version(folder)
    standing = "now current"
    if current != released.version:
        version = f"v{current} stays current" if current else "none is current"
        standing = f"{version}; to change that: --promote v{released.version}"
    logger.info("model    %s (%s)", folder / weights_name(released.version), standing)
    report = folder / report_folder_name(released.version) / "report.html"
    logger.info("report   %s", report)
