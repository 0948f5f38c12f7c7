"""Which images make up a batch, and what comes of those that cannot be read."""

import errno
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app.ml.preprocessing import Limits, PreprocessConfig
from training.config import TrainingConfig
from training.data import loader as loader_module
from training.data.cache import ImageCache
from training.data.loader import (
    Batch,
    EpochSampler,
    EvalImages,
    ImageLoader,
    ReadingThreads,
    Sample,
    SampleKey,
    TrainImages,
    collate,
    default_num_workers,
    eval_loader,
    fitting_workers,
)
from training.errors import DataError

BACKEND = Path(__file__).resolve().parents[3] / "backend"
CPU = torch.device("cpu")
CONFIG = PreprocessConfig(36, 32, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
at_least_100 = settings(max_examples=150, deadline=None)
SIZES = st.integers(1, 60)
SEEDS = st.integers(0, 2**31)


def batches_of(
    sampler: EpochSampler, epoch: int, start: int = 0, view: int | None = None
) -> list[list[SampleKey]]:
    sampler.set_epoch(epoch, start, view)
    return list(sampler)


@at_least_100
@given(SIZES, SIZES, st.integers(0, 50), st.one_of(st.none(), SEEDS))
def test_every_image_is_in_one_batch_of_an_epoch(
    num_images: int, batch_size: int, epoch: int, seed: int | None
) -> None:
    sampler = EpochSampler(num_images, batch_size, seed=seed)
    batches = batches_of(sampler, epoch, view=7)
    assert len(batches) == len(sampler)
    images = [key.image for batch in batches for key in batch]
    assert sorted(images) == list(range(num_images))
    assert seed is not None or images == list(range(num_images))
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    for number, batch in enumerate(batches):
        assert len(batch) == sampler.images_in(number)
        assert [key.position for key in batch] == list(range(len(batch)))
        assert {key.view for key in batch} == {7}


@at_least_100
@given(SIZES, SIZES, st.integers(0, 50), SEEDS)
def test_the_order_follows_from_seed_and_epoch_alone(
    num_images: int, batch_size: int, epoch: int, seed: int
) -> None:
    def order(seed: int, epoch: int, view: int = 0) -> list[int]:
        batches = batches_of(EpochSampler(num_images, batch_size, seed=seed), epoch, view=view)
        return [key.image for batch in batches for key in batch]

    first = order(seed, epoch)
    torch.manual_seed(epoch)
    assert order(seed, epoch, view=3) == first
    if num_images > 20:  # 20! orders: no two alike by chance
        assert order(seed + 1, epoch) != first and order(seed, epoch + 1) != first


@at_least_100
@given(SIZES, SIZES, st.integers(0, 9), SEEDS, st.data())
def test_an_epoch_resumed_at_any_batch_continues_as_it_would_have(
    num_images: int, batch_size: int, epoch: int, seed: int, data: st.DataObject
) -> None:
    sampler = EpochSampler(num_images, batch_size, seed=seed)
    start = data.draw(st.integers(0, len(sampler)))
    assert batches_of(sampler, epoch, start) == batches_of(sampler, epoch)[start:]


@at_least_100
@given(SIZES, st.integers(1, 20), st.integers(1, 5), SEEDS)
def test_the_shares_of_all_processes_make_up_each_batch(
    num_images: int, batch_size: int, world_size: int, seed: int
) -> None:
    whole = batches_of(EpochSampler(num_images, batch_size, seed=seed), 2)
    shares = [
        batches_of(
            EpochSampler(num_images, batch_size, seed=seed, rank=rank, world_size=world_size), 2
        )
        for rank in range(world_size)
    ]
    assert {len(share) for share in shares} == {len(whole)}
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [key for part in parts for key in part] == batch
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


# Reading --------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> tuple[str, ...]:
    """Ten photos, of which the third is text and the eighth is missing."""
    for number in range(10):
        array = np.random.default_rng(number).integers(0, 256, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / f"{number}.jpg")
    (tmp_path / "2.jpg").write_text("not a photo")
    (tmp_path / "7.jpg").unlink()
    return tuple(str(tmp_path / f"{number}.jpg") for number in range(10))


def loader(
    photos: tuple[str, ...], train: bool, num_workers: int = 0, cache: Path | None = None
) -> ImageLoader:
    if not train:
        return eval_loader(photos, CONFIG, 4, num_workers, CPU)
    images = TrainImages(
        photos, ImageCache(cache), TrainingConfig(seed=3, min_crop_scale=0.25, train_crop=32)
    )
    return ImageLoader(images, EpochSampler(len(photos), 4, seed=1), num_workers, CPU)


def epoch_of(
    reader: ImageLoader, epoch: int, start: int = 0, view: int | None = None
) -> Iterator[Batch]:
    reader.sampler.set_epoch(epoch, start, view)
    return iter(reader)


def same(left: Iterator[Batch], right: Iterator[Batch]) -> bool:
    for one, other in zip(left, right, strict=True):
        for name in ("images", "color", "indices", "positions"):
            a, b = getattr(one, name), getattr(other, name)
            if not (a is b is None or torch.equal(a, b)):
                return False
        if [p.key for p in one.problems] != [p.key for p in other.problems]:
            return False
    return True


@pytest.mark.parametrize("train", [True, False])
def test_what_cannot_be_read_is_skipped_and_named_once(
    train: bool, photos: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    reader = loader(photos, train)
    for epoch in range(3):
        batches = list(epoch_of(reader, epoch))
        assert len(batches) == 3
        indices = torch.cat([batch.indices for batch in batches])
        assert sorted(indices.tolist()) == [0, 1, 3, 4, 5, 6, 8, 9]
        for batch in batches:
            count = len(batch.indices)
            assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (count, 3, 32, 32))
            assert len(batch.positions) == count and count + len(batch.problems) in (4, 2)
            if train and count:
                assert batch.color is not None and batch.color.shape == (count, 4)
            else:
                assert batch.color is None
    assert reader.skipped.keys() == {photos[2], photos[7]}
    assert len(caplog.messages) == 2
    assert all(any(photos[n] in line for line in caplog.messages) for n in (2, 7))


def test_positions_stay_with_their_images(photos: tuple[str, ...]) -> None:
    (batch, *_) = loader(photos, train=False)
    assert batch.indices.tolist() == batch.positions.tolist() == [0, 1, 3]
    assert [sample.key.image for sample in batch.problems] == [2]
    images = EvalImages(photos, CONFIG)
    assert torch.equal(batch.images[2], images[SampleKey(3, 0, 0)].pixels)


def test_a_batch_of_nothing_readable_is_an_empty_batch(photos: tuple[str, ...]) -> None:
    (batch,) = loader((photos[2], photos[7]), train=True)
    assert batch.images.shape == (0, 3, 32, 32) and batch.color is None
    assert len(batch.indices) == len(batch.positions) == 0 and len(batch.problems) == 2
    assert collate([], 32).images.shape == (0, 3, 32, 32)


@pytest.mark.parametrize("train", [True, False])
def test_any_number_of_workers_reads_the_same(
    train: bool, photos: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    alone, helped = loader(photos, train), loader(photos, train, num_workers=2)
    for epoch, start in ((0, 0), (1, 0), (1, 2)):
        assert same(epoch_of(alone, epoch, start), epoch_of(helped, epoch, start))
    assert alone.skipped == helped.skipped


def test_the_cache_does_not_show_in_a_batch(photos: tuple[str, ...], tmp_path: Path) -> None:
    plain, cached = loader(photos, True), loader(photos, True, cache=tmp_path / "cache")
    for _ in ("filling it", "reading it"):
        assert same(epoch_of(plain, 0), epoch_of(cached, 0))


def test_a_view_is_the_same_pixels_at_any_time_and_another_view_is_not(
    photos: tuple[str, ...],
) -> None:
    reader = loader(photos, train=True)
    first, again, other = (list(epoch_of(reader, 5, view=view)) for view in (1, 1, 2))
    assert same(iter(first), iter(again))
    assert not same(iter(first), iter(other))


def test_validation_is_never_augmented(photos: tuple[str, ...]) -> None:
    reader = loader(photos, train=False)
    assert same(epoch_of(reader, 0), epoch_of(reader, 3, view=9))


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two reading threads of this test's own, whatever hangs in others."""
    own = ReadingThreads(2)
    monkeypatch.setattr(loader_module, "reading_threads", lambda: own)
    yield
    own.close()


@pytest.mark.usefixtures("threads")
def test_without_workers_threads_read_at_the_same_time(
    photos: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(epoch_of(loader(photos, train=True), 0))
    both, read = threading.Barrier(2, timeout=20), TrainImages._read

    def read_when_another_does(self: TrainImages, key: SampleKey, path: str) -> Sample:
        both.wait()
        return read(self, key, path)

    monkeypatch.setattr(TrainImages, "_read", read_when_another_does)
    assert same(iter(expected), epoch_of(loader(photos, train=True), 0))


@pytest.mark.usefixtures("threads")
def test_a_disk_that_hangs_ends_the_epoch(
    photos: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(EvalImages, "_read", lambda *_: answers.wait(60))
    monkeypatch.setattr(loader_module, "READING_TIMEOUT", 1)
    with pytest.raises(DataError, match="could not be read in 1 s; check the disk"):
        next(iter(loader(photos, train=False)))
    answers.set()


@pytest.mark.usefixtures("threads")
def test_what_a_reader_raises_is_raised(
    photos: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(EvalImages, "_read", fail)
    with pytest.raises(MemoryError, match="no room"):
        next(iter(loader(photos, train=False)))


@pytest.mark.parametrize(
    "read",
    ["lambda key: torch.ones(2000, 2000) @ torch.ones(2000, 2000)", "lambda key: time.sleep(100)"],
)
def test_a_process_ends_whatever_its_readers_do(read: str) -> None:
    """Its own way: a thread that is inside torch meanwhile would abort it."""
    script = f"""
import sys, threading, time, torch
from training.data import loader
loader.CLOSING_SECONDS = 2
threads = loader.ReadingThreads(2)
threading.Thread(target=threads.map, args=({read}, range(20)), daemon=True).start()
time.sleep(0.2)
assert torch.get_num_threads() == 2
sys.exit(3)
"""
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(BACKEND), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    assert (result.returncode, result.stderr) == (3, "")
    assert time.monotonic() - began < 60


def test_workers_help_where_the_cores_do_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, beside_a_gpu in [(1, 1), (2, 2), (64, 8)]:
        monkeypatch.setattr(loader_module, "num_cores", lambda cores=cores: cores)
        assert default_num_workers(CPU) == 0
        assert default_num_workers(torch.device("cuda")) == beside_a_gpu
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    monkeypatch.setattr(loader_module.dist, "is_initialized", lambda: True)
    assert default_num_workers(torch.device("cuda")) == 4
    # without torchrun's processes, another launcher left it behind
    monkeypatch.setattr(loader_module.dist, "is_initialized", lambda: False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "two")
    assert default_num_workers(torch.device("cuda")) == 8


# Disks and memory that are not there -----------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "OUTAGE_SECONDS", 0.2)


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[str, ...]:
    """Six pictures in two class folders."""
    for number in range(6):
        path = tmp_path / "disk" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "red").save(path)
    return tuple(map(str, sorted((tmp_path / "disk").rglob("*.png"))))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("left", ["nothing", "an empty mount point"])
def test_a_disk_that_has_gone_ends_the_epoch(
    left: str, num_workers: int, dataset: tuple[str, ...], tmp_path: Path
) -> None:
    reader = eval_loader(dataset, CONFIG, 3, num_workers, CPU)
    (tmp_path / "disk").rename(tmp_path / "away")
    if left != "nothing":
        (tmp_path / "disk").mkdir()
    with pytest.raises(DataError, match=r"can no longer be read.*check the disk"):
        list(reader)
    reader.close()
    assert not reader.skipped


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_a_disk_that_comes_back_costs_no_image(
    code: int, dataset: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([True, True])
    load = loader_module.load_image

    def away_for_a_moment(path: str, limits: Limits) -> Image.Image:
        if next(failures, False):
            raise OSError(code, os.strerror(code))
        return load(path, limits)

    monkeypatch.setattr(loader_module, "load_image", away_for_a_moment)
    reader = eval_loader(dataset, CONFIG, 3, 0, CPU)
    assert sum(len(batch.indices) for batch in reader) == 6
    assert not reader.skipped


def test_a_removed_image_or_class_folder_is_no_outage(dataset: tuple[str, ...]) -> None:
    reader = eval_loader(dataset, CONFIG, 3, 0, CPU)
    for path in dataset[:3]:
        os.remove(path)
    Path(dataset[0]).parent.rmdir()
    assert sum(len(batch.indices) for batch in reader) == 3
    assert reader.skipped.keys() == set(dataset[:3])


def test_workers_are_only_as_many_as_shared_memory_has_room_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Docker's 64 MB hold 4 times 3 batches of 32 pictures of 224 pixels."""
    for free, fitting in [(64 << 20, 4), (4 << 20, 0), (1 << 30, 8), (None, 8)]:
        caplog.clear()
        monkeypatch.setattr(loader_module, "free_shared_memory", lambda free=free: free)
        assert fitting_workers(8, 32, 224) == fitting
        assert ("--shm-size" in caplog.text) == (fitting < 8)


def test_without_temporary_files_there_are_no_workers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They could not hand their batches over, and would be waited for."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    assert fitting_workers(8, 32, 224) == 0
    assert "no image workers: No usable temporary directory" in caplog.text


READ_ONE_BY_ONE = """
import multiprocessing.synchronize, os, signal, sys, torch
from app.ml.preprocessing import PreprocessConfig
from training.data.loader import eval_loader
{before}
loader = eval_loader({dataset!r}, {config!r}, 1, 1, torch.device("cpu"))
held = sys.held = iter(loader)
next(held)
{after}
"""


def read_one_by_one(dataset: tuple[str, ...], before: str, after: str) -> str:
    """What a process prints that reads with one worker, when it ends."""
    script = READ_ONE_BY_ONE.format(before=before, after=after, dataset=dataset, config=CONFIG)
    environment = os.environ | {"PYTHONPATH": str(BACKEND)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=environment, timeout=120, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
def test_a_process_ends_whatever_holds_its_readers(dataset: tuple[str, ...]) -> None:
    """A traceback may; multiprocessing would wait for workers that ignore its SIGTERM."""
    assert read_one_by_one(dataset, "", "print('read')") == "read\n"


DIE_WITH_THE_LOCK = """
trainer = os.getpid()
ask = multiprocessing.synchronize.Event.is_set
def is_set(event):
    if os.getpid() == trainer:
        return ask(event)
    with event._cond:
        os.kill(os.getpid(), signal.SIGKILL)
multiprocessing.synchronize.Event.is_set = is_set
"""
SEE_IT_DIE = """
try:
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    list(held)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="others start their workers anew")
def test_a_killed_reader_holds_no_lock_that_the_trainer_waits_for(dataset: tuple[str, ...]) -> None:
    """The loader's own event has one: whoever is killed while it asks keeps it."""
    assert "DataLoader worker" in read_one_by_one(dataset, DIE_WITH_THE_LOCK, SEE_IT_DIE)
