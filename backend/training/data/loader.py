"""Batches of pixels, in an order and with augmentations that follow from numbers alone.

The order of an epoch comes from (seed, epoch), an image's augmentation from (seed, view, image).
So an epoch can be taken up at any batch, with any number of workers, and goes on as it would have.
An image that cannot be read is left out of its batch and named; it never stops a run.
"""

import functools
import logging
import os
import signal
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from app.ml.preprocessing import EvalTransform, ImageError, PreprocessConfig, load_image
from training.data.augmentation import augment
from training.data.cache import ImageCache

MOST_READERS = 8
# Python 3.14 would take a fork server, which outlives a trainer that is killed, as do its workers.
START_METHOD = "fork" if sys.platform == "linux" else None

logger = logging.getLogger(__name__)


class Key(NamedTuple):
    """Which image, in which view (an epoch number, usually), at which row of the whole batch."""

    image: int
    view: int
    row: int


class Item(NamedTuple):
    """One image: pixels uint8 (3, crop, crop), or why there are none."""

    key: Key
    pixels: Tensor | None
    color: Tensor | None
    problem: str | None


@dataclass
class Batch:
    """The images of a batch that could be read.

    images: uint8 (N, 3, crop, crop). color: (N, 4) draws, or None where nothing is augmented.
    indices: (N,) into the split. rows: (N,) places in the whole batch. problems: (index, reason).
    """

    images: Tensor
    color: Tensor | None
    indices: Tensor
    rows: Tensor
    problems: list[tuple[int, str]]

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader when it feeds a CUDA device."""
        self.images = self.images.pin_memory()
        return self


class TrainImages(Dataset[Item]):
    """Augmented pixels of the training split, read through the cache."""

    def __init__(
        self,
        paths: tuple[str, ...],
        cache: ImageCache,
        seed: int,
        crop: int,
        smallest_crop: float,
    ) -> None:
        self.paths, self.cache, self.seed = paths, cache, seed
        self.crop, self.smallest_crop = crop, smallest_crop

    def __getitem__(self, key: Key) -> Item:
        try:
            image = self.cache.load(self.paths[key.image])
        except (ImageError, OSError) as error:
            return Item(key, None, None, str(error))
        pixels, color = augment(
            image,
            self.crop,
            self.smallest_crop,
            seed=self.seed,
            view=key.view,
            index=key.image,
        )
        return Item(key, pixels, color, None)


class EvalImages(Dataset[Item]):
    """Pixels exactly as serving sees them; neither cached copies nor augmentation."""

    def __init__(self, paths: tuple[str, ...], config: PreprocessConfig) -> None:
        self.paths, self.crop, self.transform = paths, config.crop, EvalTransform(config)

    def __getitem__(self, key: Key) -> Item:
        try:
            pixels = self.transform(load_image(self.paths[key.image]))
        except (ImageError, OSError) as error:
            return Item(key, None, None, str(error))
        return Item(key, pixels, None, None)


class KeyBatches:
    """Which images make up each batch of a pass; a process takes its share, rank of world_size.

    A DataLoader iterates it for the pass that was asked for last.
    """

    def __init__(
        self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_images, self.batch_size = num_images, batch_size
        self.rank, self.world_size = rank, world_size
        self.next_pass: Iterator[list[Key]] = iter(())

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def batches(
        self, epoch: int, view: int, start: int, shuffle_seed: int | None, *, whole: bool = False
    ) -> Iterator[list[Key]]:
        """From batch `start` on; without a shuffle_seed, in the order of the split.

        whole: every process takes all of each batch.
        """
        order = np.arange(self.num_images)
        if shuffle_seed is not None:
            order = np.random.default_rng((shuffle_seed, epoch)).permutation(self.num_images)
        for batch in range(start, len(self)):
            images = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            rows = np.arange(len(images))
            if not whole:
                rows = np.array_split(rows, self.world_size)[self.rank]
            yield [Key(int(images[row]), view, int(row)) for row in rows]

    def __iter__(self) -> Iterator[list[Key]]:
        return self.next_pass


def collate(items: list[Item], crop: int) -> Batch:
    """Stack what could be read, in order; there may be nothing."""
    read = [item for item in items if item.pixels is not None]
    pixels = [item.pixels for item in read if item.pixels is not None]
    colors = [item.color for item in read if item.color is not None]
    return Batch(
        images=torch.stack(pixels) if read else torch.empty(0, 3, crop, crop, dtype=torch.uint8),
        color=torch.stack(colors) if colors else None,
        indices=torch.tensor([item.key.image for item in read], dtype=torch.int64),
        rows=torch.tensor([item.key.row for item in read], dtype=torch.int64),
        problems=[(item.key.image, item.problem) for item in items if item.problem is not None],
    )


class ImageLoader:
    """Reads one split, pass after pass, with worker processes.

    workers_stay: they stay alive between passes, which is worth it where there are many.
    """

    def __init__(
        self,
        dataset: TrainImages | EvalImages,
        keys: KeyBatches,
        num_workers: int,
        device: torch.device,
        *,
        workers_stay: bool = False,
    ) -> None:
        self.paths, self.keys, self.num_workers = dataset.paths, keys, num_workers
        self.left_out: dict[str, str] = {}  # path -> reason, of all passes
        self._pass: Generator[Batch, None, None] | None = None
        self._loader: DataLoader[Item] | None = DataLoader(
            dataset,
            batch_sampler=keys,
            num_workers=num_workers,
            collate_fn=functools.partial(collate, crop=dataset.crop),
            pin_memory=device.type == "cuda",
            persistent_workers=workers_stay and num_workers > 0,
            multiprocessing_context=START_METHOD if num_workers else None,
            worker_init_fn=_leave_signals_to_the_main_process,
        )

    def batches(
        self,
        epoch: int,
        view: int,
        start: int = 0,
        shuffle_seed: int | None = None,
        *,
        whole: bool = False,
    ) -> Iterator[Batch]:
        """One pass; every unreadable image is named in the log the first time it is met."""
        keys = self.keys.batches(epoch, view, start, shuffle_seed, whole=whole)
        self._pass = self._read(keys)
        return self._pass

    def close(self) -> None:
        """End the worker processes, in the middle of a pass too.

        An error's traceback would keep them alive otherwise: as they ignore SIGTERM, the process
        would wait for them at its end, and never end.
        """
        if self._pass:
            self._pass.close()
        self._loader = None

    def _read(self, keys: Iterator[list[Key]]) -> Generator[Batch, None, None]:
        assert self._loader, "closed"
        self.keys.next_pass = keys
        for batch in self._loader:
            for index, reason in batch.problems:
                self._leave_out(self.paths[index], reason)
            yield batch

    def _leave_out(self, path: str, reason: str) -> None:
        if path not in self.left_out:
            self.left_out[path] = reason
            logger.warning("left out %s: %s", path, reason)


def _leave_signals_to_the_main_process(worker: int) -> None:  # noqa: ARG001
    """Ctrl-C and SIGTERM reach the whole process group; only the trainer acts on them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def default_num_workers(device: torch.device) -> int:
    """Worker processes of one trainer: beside a GPU its share of the cores, eight at most (each
    takes about 1 ms an image); where the cores compute, one, which leaves the loop no images to
    wait for and takes 4 % of two cores."""
    cores = num_cores()
    trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    share = min(MOST_READERS, max(1, cores // trainers))
    return share if device.type == "cuda" else min(1, cores - 1)


def num_cores() -> int:
    """The cores that this process may use."""
    may_ask = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if may_ask else os.cpu_count() or 1
