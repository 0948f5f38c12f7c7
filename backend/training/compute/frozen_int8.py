"""The frozen layers in 8-bit integers while training, on CPUs where that pays.

Only training images go through them: rounding changes the features about as much as bf16 does.
What is validated, released and served are the layers as they are.
"""

import dataclasses
import logging
import math
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.ml.artifacts import reason_of
from app.ml.model import BACKBONES
from app.ml.predictor import has_vnni
from training.compute.features import FrozenPart, train_images
from training.compute.quantization import CALIBRATION_IMAGES, quantize
from training.compute.tracing import trace
from training.config import TrainingConfig
from training.data.loader import Batch, EpochSampler, ImageLoader
from training.data.splits import Split

MIN_BATCHES = 200  # fewer do not win back the seconds that quantizing takes
WORTHWHILE = 0.9  # of the plain layers' time; a smaller gain may be chance
MAX_ERROR = 0.15  # of the features, relative; MobileNetV2 has 0.06, and 0.07 in bf16
ROUNDS = 5

logger = logging.getLogger(__name__)


def int8_if_faster(
    layers: nn.Module,
    plain: FrozenPart,
    config: TrainingConfig,
    split: Split,
    skipped: dict[str, str],
) -> Tensor:
    """Return the frozen layers as a quantized ONNX file, uint8 (bytes,), or nothing if that is no
    faster here.

    plain: the layers as they are. split: of training. skipped: collects unreadable images.
    """
    nothing = torch.empty(0, dtype=torch.uint8)
    if not may_pay(layers, plain.device, config, len(split)):
        return nothing
    batch = calibration_batch(config, split, skipped)
    try:
        traced = trace(layers, config.sizes["train_crop"], "features", any_size=True)
        data = quantize(traced, plain.pixels(batch))
        file = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        int8 = plain.in_int8(file)
        error = relative_error(plain, int8, batch)
        largest = at_size(batch, config.sizes["train_crop"])
        times = compare(plain, int8, largest)
    except Exception as failure:  # noqa: BLE001  onnxruntime may raise anything
        logger.warning("frozen layers stay as they are: not quantized: %s", reason_of(failure))
        return nothing
    pays = error < MAX_ERROR and times[1] < WORTHWHILE * times[0]
    logger.info(
        "frozen layers %s: %d images of %d pixels take %.0f ms as they are, %.0f ms in int8 "
        "(error %.2g)",
        "in int8" if pays else "stay as they are",
        len(largest.images),
        largest.images.shape[-1],
        *times,
        error,
    )
    return file if pays else nothing


def may_pay(
    layers: nn.Module, device: torch.device, config: TrainingConfig, num_images: int
) -> bool:
    """Whether it is worth trying: not for layers that nobody has quantized before, and not for a
    short training, which thus never depends on a timing."""
    views = min(config.epochs, config.cache_views or config.epochs)
    num_batches = views * math.ceil(num_images / config.batch_size)
    is_known = config.model_name in BACKBONES and any(True for _ in layers.parameters())
    return device.type == "cpu" and has_vnni() and is_known and num_batches >= MIN_BATCHES


def calibration_batch(config: TrainingConfig, split: Split, skipped: dict[str, str]) -> Batch:
    """Read training images drawn by the run's seed, as training reads them."""
    order = np.random.default_rng(config.seed).permutation(len(split))[:CALIBRATION_IMAGES]
    images = train_images(config, tuple(split.paths[i] for i in order))
    sampler = EpochSampler(len(order), len(order))
    loader = ImageLoader(images, sampler, 0, torch.device("cpu"), skipped)
    (batch,) = loader
    loader.close()
    return batch


def at_size(batch: Batch, crop: int) -> Batch:
    """Return a batch of this side, to be timed: where pictures grow, at their last size."""
    return dataclasses.replace(batch, images=F.interpolate(batch.images, (crop, crop)))


def relative_error(plain: FrozenPart, int8: FrozenPart, batch: Batch) -> float:
    """Return how far the features are from the plain layers', as a share of their length."""
    expected = plain(batch).float()
    return float((int8(batch).float() - expected).norm() / expected.norm())


def compare(plain: FrozenPart, int8: FrozenPart, batch: Batch) -> tuple[float, float]:
    """Time both in turn; return the fewest milliseconds of each."""
    times: tuple[list[float], list[float]] = [], []
    for _ in range(ROUNDS):
        for part, taken in zip((plain, int8), times, strict=True):
            began = time.perf_counter()
            part(batch)
            taken.append(1000 * (time.perf_counter() - began))
    return min(times[0]), min(times[1])
