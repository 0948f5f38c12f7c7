"""Which images make up a batch, and what comes of those that cannot be read."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app.ml.preprocessing import PreprocessConfig
from training.data.cache import ImageCache
from training.data.loader import (
    Batch,
    EvalImages,
    ImageLoader,
    Key,
    KeyBatches,
    TrainImages,
    collate,
    default_num_workers,
)

CPU = torch.device("cpu")
CONFIG = PreprocessConfig(36, 32, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
at_least_100 = settings(max_examples=150, deadline=None)
SIZES = st.integers(1, 60)
SEEDS = st.integers(0, 2**31)


@at_least_100
@given(SIZES, SIZES, st.integers(0, 50), st.one_of(st.none(), SEEDS))
def test_every_image_is_in_one_batch_of_a_pass(
    num_images: int, batch_size: int, epoch: int, seed: int | None
) -> None:
    keys = KeyBatches(num_images, batch_size)
    batches = list(keys.batches(epoch, 7, 0, seed))
    assert len(batches) == len(keys)
    images = [key.image for batch in batches for key in batch]
    assert sorted(images) == list(range(num_images))
    assert seed is not None or images == list(range(num_images))
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    for batch in batches:
        assert [key.row for key in batch] == list(range(len(batch)))
        assert {key.view for key in batch} == {7}


@at_least_100
@given(SIZES, SIZES, st.integers(0, 50), SEEDS)
def test_the_order_follows_from_seed_and_epoch_alone(
    num_images: int, batch_size: int, epoch: int, seed: int
) -> None:
    def order(seed: int, epoch: int, view: int = 0) -> list[int]:
        batches = KeyBatches(num_images, batch_size).batches(epoch, view, 0, seed)
        return [key.image for batch in batches for key in batch]

    first = order(seed, epoch)
    torch.manual_seed(epoch)
    assert order(seed, epoch, view=3) == first
    if num_images > 20:  # 20! orders: no two alike by chance
        assert order(seed + 1, epoch) != first and order(seed, epoch + 1) != first


@at_least_100
@given(SIZES, SIZES, st.integers(0, 9), SEEDS, st.data())
def test_a_pass_taken_up_at_any_batch_goes_on_as_it_would_have(
    num_images: int, batch_size: int, epoch: int, seed: int, data: st.DataObject
) -> None:
    keys = KeyBatches(num_images, batch_size)
    start = data.draw(st.integers(0, len(keys)))
    assert (
        list(keys.batches(epoch, 1, start, seed)) == list(keys.batches(epoch, 1, 0, seed))[start:]
    )


@at_least_100
@given(SIZES, st.integers(1, 20), st.integers(1, 5), SEEDS)
def test_the_shares_of_all_processes_make_up_each_batch(
    num_images: int, batch_size: int, world_size: int, seed: int
) -> None:
    whole = list(KeyBatches(num_images, batch_size).batches(2, 2, 0, seed))
    shares = [
        list(KeyBatches(num_images, batch_size, rank, world_size).batches(2, 2, 0, seed))
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
    dataset = (
        TrainImages(photos, ImageCache(cache), seed=3, crop=32, smallest_crop=0.25)
        if train
        else EvalImages(photos, CONFIG)
    )
    return ImageLoader(dataset, KeyBatches(len(photos), 4), num_workers, CPU)


def same(left: Iterator[Batch], right: Iterator[Batch]) -> bool:
    for one, other in zip(left, right, strict=True):
        for name in ("images", "color", "indices", "rows"):
            a, b = getattr(one, name), getattr(other, name)
            if not (a is b is None or torch.equal(a, b)):
                return False
        if one.problems != other.problems:
            return False
    return True


@pytest.mark.parametrize("train", [True, False])
def test_what_cannot_be_read_is_left_out_and_named_once(
    train: bool, photos: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    reader = loader(photos, train)
    for epoch in range(3):
        batches = list(reader.batches(epoch, epoch, shuffle_seed=1))
        assert len(batches) == 3
        indices = torch.cat([batch.indices for batch in batches])
        assert sorted(indices.tolist()) == [0, 1, 3, 4, 5, 6, 8, 9]
        for batch in batches:
            count = len(batch.indices)
            assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (count, 3, 32, 32))
            assert len(batch.rows) == count and count + len(batch.problems) in (4, 2)
            if train and count:
                assert batch.color is not None and batch.color.shape == (count, 4)
            else:
                assert batch.color is None
    assert reader.left_out.keys() == {photos[2], photos[7]}
    assert len(caplog.messages) == 2
    assert all(any(photos[n] in line for line in caplog.messages) for n in (2, 7))


def test_rows_stay_with_their_images(photos: tuple[str, ...]) -> None:
    (batch, *_) = loader(photos, train=False).batches(0, 0)
    assert batch.indices.tolist() == batch.rows.tolist() == [0, 1, 3]
    assert [index for index, _ in batch.problems] == [2]
    images = EvalImages(photos, CONFIG)
    assert torch.equal(batch.images[2], images[Key(3, 0, 0)].pixels)


def test_a_batch_of_nothing_readable_is_an_empty_batch(photos: tuple[str, ...]) -> None:
    (batch,) = loader((photos[2], photos[7]), train=True).batches(0, 0)
    assert batch.images.shape == (0, 3, 32, 32) and batch.color is None
    assert len(batch.indices) == len(batch.rows) == 0 and len(batch.problems) == 2
    assert collate([], 32).images.shape == (0, 3, 32, 32)


@pytest.mark.parametrize("train", [True, False])
def test_any_number_of_workers_reads_the_same(
    train: bool, photos: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    alone, helped = loader(photos, train), loader(photos, train, num_workers=2)
    for epoch, start in ((0, 0), (1, 0), (1, 2)):
        assert same(
            alone.batches(epoch, epoch, start, shuffle_seed=5),
            helped.batches(epoch, epoch, start, shuffle_seed=5),
        )
    assert alone.left_out == helped.left_out


def test_the_cache_does_not_show_in_a_batch(photos: tuple[str, ...], tmp_path: Path) -> None:
    plain, cached = loader(photos, True), loader(photos, True, cache=tmp_path / "cache")
    for _ in ("filling it", "reading it"):
        assert same(plain.batches(0, 0), cached.batches(0, 0))


def test_a_view_is_the_same_pixels_in_any_epoch_and_another_view_is_not(
    photos: tuple[str, ...],
) -> None:
    reader = loader(photos, train=True)
    first, again, other = (list(reader.batches(e, v)) for e, v in ((0, 1), (5, 1), (5, 2)))
    assert same(iter(first), iter(again))
    assert not same(iter(first), iter(other))


def test_validation_is_never_augmented(photos: tuple[str, ...]) -> None:
    reader = loader(photos, train=False)
    assert same(reader.batches(0, 0), reader.batches(3, 9))


def test_workers_help_where_the_cores_do_not_compute() -> None:
    assert default_num_workers(CPU) == min(1, (os.cpu_count() or 1) - 1)
    assert default_num_workers(torch.device("cuda")) >= 1
