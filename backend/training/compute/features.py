"""What the trained part is fed with: batches of images after augmentation and the frozen part.

The frozen part never changes, so its output for the validation images is computed once and kept in
a file; with cached views the same goes for the training images, once per view. Stored features are
computed in the order of the split and in fixed batches, so the numbers do not depend on when, or
how often, a run was cut.
"""

import copy
import errno
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from app.ml.model import inference_copy
from app.ml.predictor import open_session, run_session
from app.ml.preprocessing import PreprocessConfig, normalize
from training.compute.devices import to_device
from training.compute.distributed import Processes
from training.compute.memory import MicroBatch
from training.config import TrainingConfig
from training.data.augmentation import color_jitter
from training.data.cache import RESERVED_BYTES, ImageCache
from training.data.loader import Batch, EpochSampler, EvalImages, ImageLoader, TrainImages
from training.data.splits import FoodData, Split

MAX_VALIDATION_BYTES = 4 << 30  # of all processes together; larger files would not stay in memory

logger = logging.getLogger(__name__)


class FeatureBatch(NamedTuple):
    """What one step of one process needs.

    features: (N, C, H, W), the output of the frozen part (pixels, if nothing is frozen). labels:
    (N,). positions: (N,) in the whole batch, of which other processes may hold the rest.
    num_images: in the whole batch, whether or not they could be read.
    """

    features: Tensor
    labels: Tensor
    positions: Tensor
    num_images: int


class FrozenPart:
    """From pixels to features, without gradients, in the format the device is fastest in.

    module: the frozen layers; what runs is an inference copy of them, or what `in_int8` is given.
    """

    def __init__(
        self,
        module: nn.Module,
        config: PreprocessConfig,
        device: torch.device,
        dtype: torch.dtype,
        micro_batch: MicroBatch,
    ) -> None:
        self.module = inference_copy(module, device, dtype, config.crop)
        self.config, self.device, self.dtype = config, device, dtype
        self.micro_batch = micro_batch
        self.int8: Any = None  # onnxruntime's session

    def in_int8(self, file: Tensor) -> "FrozenPart":
        """Return one that computes in integers, which it does on the CPU only.

        file: the quantized layers in ONNX, uint8 (bytes,); nothing changes for an empty one.
        """
        if not len(file):
            return self
        if self.device.type != "cpu":
            logger.warning(
                "this run's frozen layers were in int8 and are not on %s, so rounding differs",
                self.device,
            )
            return self
        part = copy.copy(self)
        part.int8 = open_session(file.numpy().tobytes(), torch.get_num_threads())
        return part

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        return self.micro_batch.map(lambda part: self._features(batch, part), len(batch.images))

    def output(self, crop: int) -> tuple[torch.Size, torch.dtype]:
        """Return the shape (C, H, W) and the dtype of the features of one image of this side."""
        none = torch.zeros(1, dtype=torch.int64)
        probe = torch.zeros(1, 3, crop, crop, dtype=torch.uint8)
        features = self(Batch(probe, None, none, none, []))
        return features.shape[1:], features.dtype

    def _features(self, batch: Batch, part: slice) -> Tensor:
        pixels = self.pixels(batch, part)
        if self.int8 is None:
            return self.module(pixels.to(dtype=self.dtype, memory_format=torch.channels_last))
        (features,) = run_session(self.int8, pixels)
        return features.to(dtype=self.dtype, memory_format=torch.channels_last)

    def pixels(self, batch: Batch, part: slice = slice(None)) -> Tensor:
        """Return float32 (N, 3, H, W), augmented if they are to train on, and standardized."""
        images = to_device(batch.images[part], self.device)
        if batch.color is None:
            return normalize(images, self.config)
        return color_jitter(images, to_device(batch.color[part], self.device), self.config)


class FeatureSource:
    """Feed one split to the trained part, epoch after epoch.

    order: which images make up each batch. store: keeps the features of as many views as it has;
    without one they are recomputed every epoch, which then is a view of its own. The loader of a
    stored split reads it in its own order, once per view.
    """

    def __init__(
        self,
        loader: ImageLoader,
        order: EpochSampler,
        labels: np.ndarray,
        frozen: FrozenPart,
        store: "FeatureStore | None" = None,
    ) -> None:
        self.loader, self.order, self.frozen, self.store = loader, order, frozen, store
        self.labels = torch.from_numpy(labels)
        self.seconds_waiting = 0.0  # for pixels, since the start

    def __len__(self) -> int:
        """Return the batches of an epoch."""
        return len(self.order)

    def epoch(
        self, epoch: int, start: int = 0, on_batch: Callable[[], object] = lambda: None
    ) -> Iterator[FeatureBatch]:
        """Iterate over the batches of an epoch from number `start` on.

        on_batch: called after each batch that is computed ahead for the store.
        """
        if self.store is None:
            self.order.set_epoch(epoch, start)
            for number, batch in enumerate(self._timed(self.loader), start):
                features = self.frozen(batch)
                yield self._feature_batch(features, batch.indices, batch.positions, number)
            return
        view = epoch % self.store.num_views
        if not self.store.is_filled(view):
            self._fill(self.store, view, on_batch)
        self.order.set_epoch(epoch, start)
        for number, keys in enumerate(self.order, start):
            indices = np.array([key.image for key in keys], dtype=np.int64)
            positions = torch.tensor([key.position for key in keys], dtype=torch.int64)
            features, present = self.store.read(view, indices)
            features = to_device(features, self.frozen.device)
            readable = torch.from_numpy(present)
            yield self._feature_batch(
                features, torch.from_numpy(indices)[readable], positions[readable], number
            )

    def _feature_batch(
        self, features: Tensor, indices: Tensor, positions: Tensor, number: int
    ) -> FeatureBatch:
        num_images = self.order.images_in(number)
        return FeatureBatch(features, self.labels[indices], positions, num_images)

    def _fill(self, store: "FeatureStore", view: int, on_batch: Callable[[], object]) -> None:
        """Compute the features of a view."""
        self.loader.sampler.set_epoch(view)
        for batch in self._timed(self.loader):
            store.put(view, batch.indices, self.frozen(batch))
            on_batch()
        store.set_filled(view)

    def _timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        iterator = iter(batches)
        while True:
            began = time.perf_counter()
            batch = next(iterator, None)
            self.seconds_waiting += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def close(self) -> None:
        """Free disk space and processes."""
        self.loader.close()
        if self.store:
            self.store.close()


class FeatureStore:
    """Features of num_images images in num_views views, in a file that is mapped into memory.

    Its name is removed at once (except on Windows, where a file in use keeps its name), so that
    even a killed process frees the disk space.
    """

    def __init__(
        self, path: Path, num_views: int, num_images: int, shape: torch.Size, dtype: torch.dtype
    ) -> None:
        """Reserve the file.

        Raises:
            OSError, RuntimeError: the disk has no room for it, or it cannot be written or mapped.
        """
        self.path, self.num_views = path, num_views
        numel = num_views * num_images * shape.numel()
        try:
            reserve(path, numel * dtype.itemsize)
            values = torch.from_file(str(path), shared=True, size=numel, dtype=dtype)
        finally:
            if os.name != "nt":
                path.unlink(missing_ok=True)
        self._features = values.view(num_views, num_images, *shape)
        self._present = np.zeros((num_views, num_images), dtype=bool)
        self._filled = np.zeros(num_views, dtype=bool)

    def is_filled(self, view: int) -> bool:
        return bool(self._filled[view])

    def put(self, view: int, indices: Tensor, features: Tensor) -> None:
        """Keep features (N, *shape) of the images with these indices (N,)."""
        self._features[view, indices] = features.cpu()
        self._present[view, indices.numpy()] = True

    def set_filled(self, view: int) -> None:
        """Note that all images of a view that could be read are there."""
        self._filled[view] = True

    def read(self, view: int, indices: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Return the features (M, *shape) of the images that are there, and which are: (N,)."""
        present = self._present[view, indices]
        return self._features[view, torch.from_numpy(indices[present])], present

    def close(self) -> None:
        """Free the disk space."""
        self._features = torch.empty(0)
        with suppress(OSError):  # a disk that is gone or read-only by now; the training is done
            self.path.unlink(missing_ok=True)


def reserve(path: Path, num_bytes: int) -> None:
    """Make a file of this size whose blocks exist: a hole would crash the process when full.

    Raises:
        OSError: there is no room for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(path.parent).free < num_bytes + RESERVED_BYTES:
        raise OSError(f"{num_bytes / 1e9:.1f} GB of features do not fit on the disk of {path}")
    with path.open("wb") as file:
        if not _allocate(file.fileno(), num_bytes):
            for _ in range(0, num_bytes, 1 << 20):
                file.write(bytes(1 << 20))
            file.truncate(num_bytes)


def _allocate(descriptor: int, num_bytes: int) -> bool:
    """Allocate a file's blocks; False where the system or the disk cannot (macOS, some shares)."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            return False
        raise
    return True


def feature_sources(
    config: TrainingConfig,
    data: FoodData,
    frozen: FrozenPart,
    int8: Tensor,
    run_dir: Path,
    processes: Processes,
    skipped: dict[str, str],
) -> tuple[FeatureSource, FeatureSource]:
    """Build what training and validation are fed from.

    int8: what training images go through, see `FrozenPart.in_int8`. skipped: collects unreadable
    images.
    """
    return (
        _train_source(config, data.train, frozen.in_int8(int8), run_dir, processes, skipped),
        _val_source(config, data.val, frozen, run_dir, processes, skipped),
    )


def train_images(config: TrainingConfig, paths: tuple[str, ...]) -> TrainImages:
    """Augment images as these settings say."""
    crop = config.sizes["train_crop"]
    cache = config.checkpoint_dir / "image_cache" if config.cache_images == "on" else None
    return TrainImages(paths, ImageCache(cache, crop), config)


def _train_source(
    config: TrainingConfig,
    split: Split,
    frozen: FrozenPart,
    run_dir: Path,
    processes: Processes,
    skipped: dict[str, str],
) -> FeatureSource:
    crop, batch_size = config.sizes["train_crop"], config.batch_size
    store = open_store(
        run_dir / f"train-features-{processes.rank}.bin",
        (config.cache_views, len(split)),
        crop,
        frozen,
        processes,
    )
    share = {"rank": processes.rank, "world_size": processes.world_size}
    order = EpochSampler(len(split), batch_size, seed=config.seed, **share)
    # Shuffling deals the images of a batch out anew, so that each process stores all of them.
    reading = EpochSampler(len(split), batch_size) if store else order
    images = train_images(config, split.paths)
    loader = ImageLoader(
        images, reading, int(config.num_workers), frozen.device, skipped, workers_stay=not store
    )
    return FeatureSource(loader, order, split.labels, frozen, store)


def _val_source(
    config: TrainingConfig,
    split: Split,
    frozen: FrozenPart,
    run_dir: Path,
    processes: Processes,
    skipped: dict[str, str],
) -> FeatureSource:
    store = open_store(
        run_dir / f"val-features-{processes.rank}.bin",
        (1, len(split)),
        frozen.config.crop,
        frozen,
        processes,
        max_bytes=MAX_VALIDATION_BYTES / processes.world_size,
    )
    share = {"rank": processes.rank, "world_size": processes.world_size}
    order = EpochSampler(len(split), config.batch_size, **share)
    images = EvalImages(split.paths, frozen.config)
    loader = ImageLoader(images, order, int(config.num_workers), frozen.device, skipped)
    return FeatureSource(loader, order, split.labels, frozen, store)


def open_store(
    path: Path,
    views_and_images: tuple[int, int],
    crop: int,
    frozen: FrozenPart,
    processes: Processes,
    max_bytes: float = math.inf,
) -> "FeatureStore | None":
    """Reserve room for features; None, with a line that says why, where there is none.

    crop: the side of the images. All processes have a store, or none has.
    """
    num_views, num_images = views_and_images
    if not num_views:
        return None
    store = None
    try:
        shape, dtype = frozen.output(crop)
        num_bytes = num_views * num_images * shape.numel() * dtype.itemsize
        if num_bytes > max_bytes:
            raise OSError(
                f"{num_bytes / 1e9:.1f} GB of them are more than {max_bytes / 1e9:.1f}; freezing "
                "more layers makes them smaller"
            )
        store = FeatureStore(path, num_views, num_images, shape, dtype)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where mmap fails
        logger.warning("features are recomputed every epoch: %s", error)
    if processes.max(float(store is None)) == [0.0]:
        return store
    if store:
        store.close()
    return None
