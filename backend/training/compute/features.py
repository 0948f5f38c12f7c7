"""What the trained part is fed with: batches of images after augmentation and the frozen part.

The frozen part never changes, so its output for the validation images is computed once and kept
in a file; with cached views the same goes for the training images, once per view. Stored rows are
computed in the order of the split and in fixed batches, so the numbers do not depend on when, or
how often, a run was cut.
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from app.ml.model import backbone, inference_copy
from app.ml.preprocessing import PreprocessConfig, normalize
from training.compute.devices import choose_dtype
from training.compute.distributed import Processes
from training.config import TrainingConfig
from training.data.augmentation import color_jitter
from training.data.cache import RESERVED_BYTES, ImageCache
from training.data.loader import (
    Batch,
    EvalImages,
    ImageLoader,
    KeyBatches,
    TrainImages,
    default_num_workers,
)
from training.data.splits import FoodData
from training.run.state import MicroBatch

MOST_VALIDATION_BYTES = 4 << 30  # of all processes together; larger files would not stay in memory

logger = logging.getLogger(__name__)


class FeatureBatch(NamedTuple):
    """features: (N, C, H, W), what the frozen part gave. labels: (N,). rows: (N,) places in the
    whole batch, of which other processes may hold the rest."""

    features: Tensor
    labels: Tensor
    rows: Tensor


class FrozenPart:
    """From pixels to features, without gradients, in the format the device is fastest in."""

    def __init__(
        self,
        module: nn.Module,
        config: PreprocessConfig,
        device: torch.device,
        dtype: torch.dtype,
        micro_batch: MicroBatch,
    ) -> None:
        self.module, self.config, self.device, self.dtype = module, config, device, dtype
        self.micro_batch = micro_batch

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        return self.micro_batch.map(lambda part: self._features(batch, part), len(batch.images))

    def _features(self, batch: Batch, part: slice) -> Tensor:
        images = batch.images[part].to(self.device, non_blocking=True)
        if batch.color is None:
            pixels = normalize(images, self.config)
        else:
            pixels = color_jitter(images, batch.color[part].to(self.device), self.config)
        pixels = pixels.to(dtype=self.dtype, memory_format=torch.channels_last)
        return self.module(pixels)


class FeatureSource:
    """Feeds one split to the trained part, pass after pass.

    num_views: 0 computes the features anew in each pass, which is then a view of its own;
    K keeps those of K views in `store_path` and shows view (epoch mod K), unless they take more
    than most_bytes.
    """

    def __init__(
        self,
        loader: ImageLoader,
        labels: np.ndarray,
        frozen: FrozenPart,
        num_views: int,
        store_path: Path,
        processes: Processes,
        most_bytes: float = math.inf,
    ) -> None:
        self.processes, self.most_bytes = processes, most_bytes
        self.loader, self.frozen, self.num_views = loader, frozen, num_views
        self.labels = torch.from_numpy(labels)
        self.store_path = store_path
        self.store: FeatureStore | None = None
        self.can_store = num_views > 0
        self.seconds_waiting = 0.0  # for pixels, since the start

    def __len__(self) -> int:
        """Batches in a pass."""
        return len(self.loader.keys)

    def batches(
        self, epoch: int, start: int = 0, shuffle_seed: int | None = None
    ) -> Iterator[FeatureBatch]:
        """The batches of a pass from number `start` on; without a shuffle_seed, in split order."""
        for _ in self.prepare(epoch, shuffle_seed):
            pass
        if self.store:
            yield from self._from_store(self.store, epoch, start, shuffle_seed)
            return
        passes = self.loader.batches(epoch, self._view(epoch), start, shuffle_seed)
        for batch in self._timed(passes):
            yield FeatureBatch(self.frozen(batch), self.labels[batch.indices], batch.rows)

    def prepare(self, epoch: int, shuffle_seed: int | None = None) -> Iterator[None]:
        """Compute what is kept for this pass where it is not there yet, one batch at a time."""
        if self.can_store and self.store is None:
            self._open_store()
            if self.processes.highest(float(not self.can_store)):  # all have one or none has
                self._drop_store()
                self.can_store = False
        view = self._view(epoch)
        if self.store is None or self.store.is_filled(view):
            return
        # Shuffling deals the images of a batch out anew, so that each process needs all of them.
        whole = shuffle_seed is not None
        for batch in self._timed(self.loader.batches(view, view, whole=whole)):
            self.store.put(view, batch.indices, self.frozen(batch))
            yield
        self.store.set_filled(view)

    def _view(self, epoch: int) -> int:
        return epoch % self.num_views if self.num_views else epoch

    def _timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        iterator = iter(batches)
        while True:
            began = time.perf_counter()
            batch = next(iterator, None)
            self.seconds_waiting += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _open_store(self) -> None:
        device, config = self.frozen.device, self.frozen.config
        probe = torch.zeros(1, 3, config.crop, config.crop, dtype=torch.uint8, device=device)
        empty = torch.zeros(1, dtype=torch.int64)
        features = self.frozen(Batch(probe, None, empty, empty, []))
        num_bytes = self.num_views * len(self.labels) * features.nbytes
        try:
            if num_bytes > self.most_bytes:
                raise OSError(
                    f"{num_bytes / 1e9:.1f} GB of them are more than {self.most_bytes / 1e9:.1f}; "
                    "more --freeze_layers make them smaller"
                )
            self.store = FeatureStore(
                self.store_path,
                self.num_views,
                len(self.labels),
                features.shape[1:],
                features.dtype,
            )
        except (OSError, RuntimeError) as error:  # torch's words for what cannot be mapped
            logger.warning("features are computed anew in each epoch: %s", error)
            self.can_store = False

    def _from_store(
        self, store: "FeatureStore", epoch: int, start: int, shuffle_seed: int | None
    ) -> Iterator[FeatureBatch]:
        for keys in self.loader.keys.batches(epoch, epoch, start, shuffle_seed):
            indices = np.array([key.image for key in keys], dtype=np.int64)
            rows = torch.tensor([key.row for key in keys], dtype=torch.int64)
            features, present = store.read(self._view(epoch), indices)
            there = torch.from_numpy(present)
            features = features.to(self.frozen.device, non_blocking=True)
            yield FeatureBatch(features, self.labels[indices[present]], rows[there])

    def close(self) -> None:
        """Give back disk space and processes."""
        self._drop_store()
        self.loader.close()

    def _drop_store(self) -> None:
        if self.store:
            self.store.close()
            self.store = None


class FeatureStore:
    """Features of num_images images in num_views views, in a file that is mapped into memory.

    Its name is removed at once (but on Windows, where that cannot be done to a file in use), so
    that even a killed process gives the disk space back.
    """

    def __init__(
        self, path: Path, num_views: int, num_images: int, shape: torch.Size, dtype: torch.dtype
    ) -> None:
        """Reserve the file.

        Raises:
            OSError, RuntimeError: the disk has no room for it, or it cannot be written or mapped.
        """
        self.path = path
        numel = num_views * num_images * shape.numel()
        try:
            _reserve(path, numel * dtype.itemsize)
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
        """Features (M, *shape) of those of the (N,) images that are there, and which ones: (N,)."""
        present = self._present[view, indices]
        return self._features[view, torch.from_numpy(indices[present])], present

    def close(self) -> None:
        """Give the disk space back."""
        del self._features
        self.path.unlink(missing_ok=True)


def _reserve(path: Path, num_bytes: int) -> None:
    """Make a file of this size whose blocks exist: a hole would crash the process when full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(path.parent).free < num_bytes + RESERVED_BYTES:
        raise OSError(f"{num_bytes / 1e9:.1f} GB of features do not fit on the disk of {path}")
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return
        for _ in range(0, num_bytes, 1 << 20):
            file.write(bytes(1 << 20))
        file.truncate(num_bytes)


def feature_sources(
    config: TrainingConfig,
    data: FoodData,
    frozen: nn.Module,
    run_dir: Path,
    device: torch.device,
    processes: Processes,
    micro_batch: MicroBatch,
) -> tuple[FeatureSource, FeatureSource]:
    """What training and validation are fed from."""
    preprocessing = PreprocessConfig(**backbone(config.model_name).preprocessing)
    dtype = choose_dtype(config.precision, device)
    if (
        config.freeze_layers == "all"
    ):  # then only the pooled features matter, which are 49 times smaller
        frozen = nn.Sequential(frozen, nn.AdaptiveAvgPool2d(1))
    network = inference_copy(frozen, device, dtype)
    part = FrozenPart(network, preprocessing, device, dtype, micro_batch)
    workers = config.num_workers
    num_workers = default_num_workers(device) if workers == "auto" else int(workers)
    cache = config.checkpoint_dir / "image_cache" if config.cache_images == "on" else None
    share = (config.batch_size, processes.rank, processes.world_size)
    train_images = TrainImages(
        data.train.paths,
        ImageCache(cache),
        config.seed,
        preprocessing.crop,
        config.smallest_crop,
    )
    train_loader = ImageLoader(
        train_images,
        KeyBatches(len(data.train), *share),
        num_workers,
        device,
        workers_stay=not config.cache_views,
    )
    val_images = EvalImages(data.val.paths, preprocessing)
    val_loader = ImageLoader(val_images, KeyBatches(len(data.val), *share), num_workers, device)
    train_store = run_dir / f"train-features-{processes.rank}.bin"
    val_store = run_dir / f"val-features-{processes.rank}.bin"
    train = FeatureSource(
        train_loader, data.train.labels, part, config.cache_views, train_store, processes
    )
    most_bytes = MOST_VALIDATION_BYTES / processes.world_size
    val = FeatureSource(val_loader, data.val.labels, part, 1, val_store, processes, most_bytes)
    return train, val
