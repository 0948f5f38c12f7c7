"""Batches of pixels, in an order and with augmentations that follow from numbers alone.

The order of an epoch comes from (seed, epoch), an image's augmentation from (seed, view, image). So
an epoch can be resumed at any batch, with any number of workers, and continues as it would have.
An image that cannot be read is skipped and named; a disk that has gone ends the run.
"""

import atexit
import errno
import functools
import logging
import mmap
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from app.ml.machine import free_shared_memory, num_cores
from app.ml.preprocessing import (
    TRAINING_LIMITS,
    EvalTransform,
    ImageError,
    PreprocessConfig,
    load_image,
)
from training.config import TrainingConfig
from training.data.augmentation import augment
from training.data.cache import ImageCache
from training.errors import DataError

MAX_WORKERS = 8
PREFETCH = 2  # batches that each worker reads ahead
READING_TIMEOUT = 300  # seconds after which a worker or a thread that reads counts as hanging
CLOSING_SECONDS = 5  # what threads that read are given to end at exit
OUTAGE_SECONDS = 30  # how long a disk that has gone is waited for
OUTAGE_ERRORS = {errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ENODEV, errno.ENXIO}
OUTAGE_ERRORS |= {errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ECONNABORTED}

logger = logging.getLogger(__name__)


class Flag:
    """A multiprocessing.Event without its lock, which a worker that is killed may hold for ever.

    PyTorch asks and sets it where it notices that a worker has died: the trainer would hang there.
    """

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 1)  # with the processes that are forked

    def set(self) -> None:
        self._shared[0] = 1

    def is_set(self) -> bool:
        return self._shared[0] == 1


# Python 3.14 defaults to a fork server, which outlives a trainer that is killed, as do its workers.
START_METHOD: BaseContext | None = None
if sys.platform == "linux":

    class Worker(multiprocessing.context.ForkProcess):
        """A process that ends when PyTorch ends it: it ignores SIGTERM."""

        def terminate(self) -> None:
            self.kill()

    class ForkContext(multiprocessing.context.ForkContext):
        """Forks, and has a flag where others have an event."""

        Process = Worker

        def Event(self) -> Flag:  # type: ignore[override]
            return Flag()

    START_METHOD = ForkContext()


class SampleKey(NamedTuple):
    """Which image, in which view (usually an epoch), at which position of the whole batch."""

    image: int
    view: int
    position: int


class Sample(NamedTuple):
    """One image: uint8 (3, crop, crop), or the reason why it could not be read."""

    key: SampleKey
    pixels: Tensor | None = None
    color: Tensor | None = None
    problem: str | None = None
    is_outage: bool = False  # the disk failed, not this image


@dataclass
class Batch:
    """The images of a batch that could be read.

    images: uint8 (N, 3, crop, crop). color: (N, 4) draws, or None where nothing is augmented.
    indices: (N,) into the split. positions: (N,) in the whole batch. problems: those not read.
    """

    images: Tensor
    color: Tensor | None
    indices: Tensor
    positions: Tensor
    problems: list[Sample]

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader when it feeds a CUDA device."""
        self.images = self.images.pin_memory()
        return self


class Images(Dataset[Sample]):
    """A split whose images are read one batch at a time; subclasses say how."""

    def __init__(self, paths: tuple[str, ...], crop: int) -> None:
        self.paths, self.crop = paths, crop
        self.root = Path(paths[0]).parent.parent if paths else Path()  # of its class folders
        self._had_root = self.root.exists()

    def __getitems__(self, keys: list[SampleKey]) -> list[Sample]:
        """Called by the DataLoader for each batch.

        Raises:
            DataError: the disk hangs; in a worker, PyTorch finds that out.
        """
        read = functools.partial(self._sample, patience=Patience())
        if get_worker_info():
            return [read(key) for key in keys]
        return reading_threads().map(read, keys)

    def __getitem__(self, key: SampleKey) -> Sample:
        return self._sample(key, Patience())

    def _sample(self, key: SampleKey, patience: "Patience") -> Sample:
        path = self.paths[key.image]
        while True:
            try:
                return self._read(key, path)
            except ImageError as error:
                return Sample(key, problem=str(error))
            except OSError as error:
                is_outage = self._is_outage(error)
                if not is_outage or patience.is_over():
                    return Sample(key, problem=str(error), is_outage=is_outage)

    def _is_outage(self, error: OSError) -> bool:
        """Tell a disk that has gone from a file or a class folder that has been removed."""
        if error.errno != errno.ENOENT:
            return error.errno in OUTAGE_ERRORS
        try:
            return self._had_root and not any(self.root.iterdir())
        except OSError:
            return True

    def _read(self, key: SampleKey, path: str) -> Sample:
        raise NotImplementedError


class TrainImages(Images):
    """Augmented pixels of the training split, read through the cache."""

    def __init__(self, paths: tuple[str, ...], cache: ImageCache, config: TrainingConfig) -> None:
        super().__init__(paths, config.sizes["train_crop"])  # the largest of the run
        self.cache, self.config = cache, config

    def _read(self, key: SampleKey, path: str) -> Sample:
        image, crop = self.cache.load(path), self.config.crop_in(key.view)
        return Sample(key, *augment(image, crop, self.config, key.view, key.image))


class EvalImages(Images):
    """Pixels exactly as serving sees them; neither cached copies nor augmentation."""

    def __init__(self, paths: tuple[str, ...], config: PreprocessConfig) -> None:
        super().__init__(paths, config.crop)
        self.transform = EvalTransform(config)

    def _read(self, key: SampleKey, path: str) -> Sample:
        return Sample(key, self.transform(load_image(path, TRAINING_LIMITS)))


class ReadingThreads:
    """Threads that read a batch between them, where there are no worker processes.

    Cores that compute have nothing to gain from reading ahead: a worker beside two threads that
    compute makes one of them wait for the other (docs/experiments.md). Unlike the threads of
    Python's pools these need no shared memory, and one that hangs keeps no process alive.
    """

    def __init__(self, count: int) -> None:
        torch.get_num_threads()  # this thread's own number, before the others set theirs
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def _work(self) -> None:
        torch.set_num_threads(1)
        while job := self._jobs.get():
            job()

    def map(self, read: Callable[[SampleKey], Sample], keys: list[SampleKey]) -> list[Sample]:
        """Read all of them, in order.

        Raises:
            DataError: one of them takes longer than `READING_TIMEOUT`.
        """
        samples: list[Future[Sample]] = [Future() for _ in keys]
        for key, sample in zip(keys, samples, strict=True):
            self._jobs.put(functools.partial(_fulfil, sample, read, key))
        return [_waited_for(sample) for sample in samples]

    def close(self) -> None:
        """Drop what is not begun and end; a process that exits with a thread in torch aborts."""
        with suppress(Empty):
            while True:
                self._jobs.get_nowait()
        for _ in self._threads:
            self._jobs.put(None)
        until = time.monotonic() + CLOSING_SECONDS
        for thread in self._threads:
            thread.join(max(0, until - time.monotonic()))


def _fulfil(sample: "Future[Sample]", read: Callable[[SampleKey], Sample], key: SampleKey) -> None:
    try:
        sample.set_result(read(key))
    except BaseException as error:  # noqa: BLE001 (it is raised where the sample is waited for)
        sample.set_exception(error)


def _waited_for(sample: "Future[Sample]") -> Sample:
    for _ in range(READING_TIMEOUT):  # of a second, so that being halted counts as one
        if wait([sample], timeout=1).done:
            return sample.result()
    raise DataError(
        f"an image could not be read in {READING_TIMEOUT} s; check the disk that holds it"
    )


@functools.cache
def reading_threads() -> ReadingThreads:
    """Start this process's reading threads, once."""
    return ReadingThreads(share_of_cores())


class Patience:
    """Wait for a disk that has gone, for `OUTAGE_SECONDS` in all.

    A network share that is away for a moment must not cost the images behind it.
    """

    def __init__(self) -> None:
        self._until: float | None = None

    def is_over(self) -> bool:
        """Wait a little; True once there is no point in waiting any longer."""
        if self._until is None:
            self._until = time.monotonic() + OUTAGE_SECONDS
        if time.monotonic() >= self._until:
            return True
        time.sleep(0.5)
        return False


class EpochSampler(Sampler[list[SampleKey]]):
    """Which images make up each batch of an epoch; a process takes its share, rank of world_size.

    seed: shuffles by (seed, epoch); None keeps the order of the split.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0, view: int | None = None) -> None:
        """Choose the next epoch to iterate, from batch `start` on; view: the epoch by default."""
        self.epoch, self.start = epoch, start
        self.view = epoch if view is None else view

    def __len__(self) -> int:
        """Return the batches of a whole epoch."""
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = np.arange(self.num_images)
        if self.seed is not None:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_images)
        for batch in range(self.start, len(self)):
            images = order[batch * self.batch_size :][: self.batch_size]
            positions = np.array_split(np.arange(len(images)), self.world_size)[self.rank]
            yield [SampleKey(int(images[p]), self.view, int(p)) for p in positions]

    def images_in(self, batch: int) -> int:
        """Return how many images the whole batch has, over all processes."""
        return min(self.batch_size, self.num_images - batch * self.batch_size)


def collate(samples: list[Sample], crop: int) -> Batch:
    """Stack what could be read, in order; there may be nothing."""
    read = [sample for sample in samples if sample.pixels is not None]
    pixels = [sample.pixels for sample in read if sample.pixels is not None]
    colors = [sample.color for sample in read if sample.color is not None]
    return Batch(
        images=torch.stack(pixels) if read else torch.empty(0, 3, crop, crop, dtype=torch.uint8),
        color=torch.stack(colors) if colors else None,
        indices=torch.tensor([sample.key.image for sample in read], dtype=torch.int64),
        positions=torch.tensor([sample.key.position for sample in read], dtype=torch.int64),
        problems=[sample for sample in samples if sample.problem is not None],
    )


class ImageLoader:
    """Iterate over the batches of one split, in the sampler's order.

    skipped: collects path -> reason, of all epochs. workers_stay: they stay alive between epochs,
    which is worth it where there are many.
    """

    def __init__(
        self,
        dataset: TrainImages | EvalImages,
        sampler: EpochSampler,
        num_workers: int,
        device: torch.device,
        skipped: dict[str, str] | None = None,
        *,
        workers_stay: bool = False,
    ) -> None:
        num_workers = fitting_workers(num_workers, sampler.batch_size, dataset.crop)
        self.paths, self.sampler, self.num_workers = dataset.paths, sampler, num_workers
        self.skipped = {} if skipped is None else skipped
        self._iterator: Any = None
        self._loader: DataLoader[Sample] | None = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=functools.partial(collate, crop=dataset.crop),
            pin_memory=device.type == "cuda",
            timeout=READING_TIMEOUT if num_workers else 0,
            prefetch_factor=PREFETCH if num_workers else None,
            persistent_workers=workers_stay and num_workers > 0,
            multiprocessing_context=START_METHOD if num_workers else None,
            worker_init_fn=_leave_signals_to_the_main_process,
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Read an epoch; each unreadable image is logged the first time it is met.

        Raises:
            DataError: the disk has gone.
        """
        return self._read()

    def _read(self) -> Iterator[Batch]:
        assert self._loader, "closed"
        batches = self._iterator = iter(self._loader)
        while (batch := _next_of(batches)) is not None:
            for sample in batch.problems:
                self._skip(self.paths[sample.key.image], sample)
            yield batch

    def _skip(self, path: str, sample: Sample) -> None:
        if sample.is_outage:
            raise DataError(
                f"the images can no longer be read; waited {OUTAGE_SECONDS} s "
                f"({sample.problem}); check the disk that holds them"
            )
        if path not in self.skipped:
            self.skipped[path] = sample.problem or ""
            logger.warning("skipped %s: %s", path, sample.problem)

    def close(self) -> None:
        """End the worker processes, in the middle of an epoch too.

        PyTorch ends them when nothing refers to its iterator, which an error's traceback does.
        """
        if self._iterator and self.num_workers:
            self._iterator._shutdown_workers()
        self._iterator = self._loader = None


def _next_of(batches: Iterator[Batch]) -> Batch | None:
    """Take the next batch, if there is one.

    Raises:
        RuntimeError: a worker died, as PyTorch's own.
    """
    try:
        return next(batches, None)
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        # A worker hands over the memory of a batch when the batch is taken. Of its death PyTorch
        # tells by an error in a signal's handler, which may be late: it had better strike here.
        time.sleep(5)
        raise RuntimeError("DataLoader worker died before its batch was taken") from error


def eval_loader(
    paths: tuple[str, ...],
    config: PreprocessConfig,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> ImageLoader:
    """Read images exactly as serving sees them, in their order."""
    sampler = EpochSampler(len(paths), batch_size)
    return ImageLoader(EvalImages(paths, config), sampler, num_workers, device)


def fitting_workers(num_workers: int, batch_size: int, crop: int) -> int:
    """Lower the number of workers to what their batches in shared memory leave room for.

    A worker that finds /dev/shm full (Docker gives it 64 MB) loses its batch, and the trainer would
    wait for that batch forever. So it would where workers cannot hand batches over, which takes a
    folder for temporary files.
    """
    if not num_workers:
        return 0
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        logger.warning("no image workers: %s; set TMPDIR", error.strerror)
        return 0
    free = free_shared_memory()
    if free is None:
        return num_workers
    bytes_each = (PREFETCH + 1) * batch_size * 3 * crop * crop
    fitting = min(num_workers, int(0.9 * free) // bytes_each)
    if fitting < num_workers:
        logger.warning(
            "shared memory has room for %d of %d image workers (/dev/shm: %d MB free); for more: "
            "docker run --shm-size=1g",
            fitting,
            num_workers,
            free >> 20,
        )
    return fitting


@atexit.register
def _kill_workers() -> None:
    """End what an error's traceback kept alive: multiprocessing would wait for it for ever.

    At its own exit it sends the daemons SIGTERM, which the workers ignore, and joins them.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises an error for each
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _leave_signals_to_the_main_process(worker: int) -> None:  # noqa: ARG001
    """Ctrl-C and SIGTERM reach the whole process group; only the trainer acts on them."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def chosen_num_workers(num_workers: int | str, device: torch.device) -> int:
    """Return how many processes read images; `auto` depends on the machine."""
    return default_num_workers(device) if num_workers == "auto" else int(num_workers)


def default_num_workers(device: torch.device) -> int:
    """Choose the number of worker processes of one trainer.

    Beside a GPU its share of the cores (each takes about 1 ms an image); none where the cores
    compute, see `ReadingThreads`.
    """
    if device.type == "cpu":
        return 0
    return share_of_cores() if device.type == "cuda" else min(1, num_cores() - 1)


def share_of_cores() -> int:
    """Return how many cores one trainer of this machine may read with, eight at most."""
    # Set by torchrun; where no processes have joined, another launcher left it behind.
    joined = dist.is_available() and dist.is_initialized()
    trainers = int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if joined else 1
    return min(MAX_WORKERS, max(1, num_cores() // trainers))
