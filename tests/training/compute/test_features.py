"""What the trained part is fed with: computed or stored, the features are the same."""

import copy
import errno
import math
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from app.ml.model import backbone, build_model, split_model
from app.ml.preprocessing import PreprocessConfig, normalize
from training.compute import features
from training.compute.distributed import Processes
from training.compute.features import (
    FeatureBatch,
    FeatureSource,
    FrozenPart,
    feature_sources,
    open_store,
)
from training.compute.memory import MicroBatch
from training.config import TrainingConfig
from training.data.cache import ImageCache
from training.data.loader import (
    EpochSampler,
    EvalImages,
    ImageLoader,
    SampleKey,
    TrainImages,
    eval_loader,
)
from training.data.splits import FoodData, Split

CPU = torch.device("cpu")
CONFIG = PreprocessConfig(36, 32, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NUM_IMAGES = 11
LABELS = np.arange(NUM_IMAGES) % 3


@pytest.fixture
def photos(tmp_path: Path) -> tuple[str, ...]:
    """Eleven photos; the fifth cannot be read."""
    for number in range(NUM_IMAGES):
        array = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / f"{number}.png")
    (tmp_path / "4.png").write_text("not a photo")
    return tuple(str(tmp_path / f"{number}.png") for number in range(NUM_IMAGES))


def frozen(dtype: torch.dtype = torch.float32) -> FrozenPart:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU()).to(dtype)
    return FrozenPart(module, CONFIG, CPU, dtype, MicroBatch(64))


def source(
    photos: tuple[str, ...],
    folder: Path,
    num_views: int,
    train: bool = True,
    seed: int | None = 8,
    max_bytes: float = math.inf,
) -> FeatureSource:
    part, path = frozen(), folder / "store" / "train.bin"
    store = open_store(path, (num_views, len(photos)), 32, part, Processes(), max_bytes)
    order = EpochSampler(len(photos), 4, seed=seed)
    reading = EpochSampler(len(photos), 4) if store else order
    dataset = (
        TrainImages(
            photos, ImageCache(None), TrainingConfig(seed=3, min_crop_scale=0.25, train_crop=32)
        )
        if train
        else EvalImages(photos, CONFIG)
    )
    loader = ImageLoader(dataset, reading, 0, CPU)
    return FeatureSource(loader, order, LABELS, part, store)


def assert_same(left: list[FeatureBatch], right: list[FeatureBatch], exactly: bool = False) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.labels, other.labels) and torch.equal(one.positions, other.positions)
        # Another batch size may take another convolution routine, with its own rounding.
        tolerance = 0.0 if exactly else 1e-5
        torch.testing.assert_close(one.features, other.features, atol=tolerance, rtol=tolerance)


def test_the_frozen_part_gives_the_features_of_normalized_pixels(photos: tuple[str, ...]) -> None:
    part = frozen()
    batch = next(iter(eval_loader(photos, CONFIG, 4, 0, CPU)))
    given = part(batch)
    torch.testing.assert_close(given, part.module(normalize(batch.images, CONFIG)).detach())
    assert not given.requires_grad
    assert frozen(torch.bfloat16)(batch).dtype == torch.bfloat16


def test_batches_carry_the_labels_of_their_images(photos: tuple[str, ...], tmp_path: Path) -> None:
    for num_views in (0, 2):
        feed = source(photos, tmp_path, num_views)
        assert len(feed) == 3
        for epoch in range(3):
            labels = torch.cat([batch.labels for batch in feed.epoch(epoch)])
            assert sorted(labels.tolist()) == sorted(np.delete(LABELS, 4).tolist())
        feed.close()


@pytest.mark.parametrize("train", [True, False])
def test_stored_features_are_the_computed_ones(
    train: bool, photos: tuple[str, ...], tmp_path: Path
) -> None:
    """View by view: epoch 4 of 3 views shows view 1 again."""
    stored, computed = (source(photos, tmp_path, views, train) for views in (3, 0))
    for epoch in range(3):
        assert_same(
            list(stored.epoch(epoch)),
            list(computed.epoch(epoch)),
        )
    unshuffled = source(photos, tmp_path, 3, train, seed=None)
    again = torch.cat([b.features for b in unshuffled.epoch(4)])
    view_1 = torch.cat([b.features for b in unshuffled.epoch(1)])
    assert torch.equal(again, view_1)
    if train:
        view_0 = torch.cat([b.features for b in unshuffled.epoch(0)])
        assert not torch.allclose(view_0, view_1)
    stored.close()
    unshuffled.close()


def test_a_view_is_computed_once(photos: tuple[str, ...], tmp_path: Path) -> None:
    feed, filled = source(photos, tmp_path, 2), []
    for epoch in range(6):
        list(feed.epoch(epoch, on_batch=lambda epoch=epoch: filled.append(epoch)))
    assert filled == [0, 0, 0, 1, 1, 1]
    feed.close()


def test_what_is_stored_does_not_depend_on_where_the_run_was_cut(
    photos: tuple[str, ...], tmp_path: Path
) -> None:
    """Bit for bit, or a resumed run would not be the uninterrupted one."""
    whole, resumed = (source(photos, tmp_path / name, 2) for name in ("whole", "resumed"))
    expected = [list(whole.epoch(epoch)) for epoch in range(2)]
    assert_same(list(resumed.epoch(1, 2)), expected[1][2:], exactly=True)
    assert_same(list(resumed.epoch(0, 1)), expected[0][1:], exactly=True)
    whole.close()
    resumed.close()


def test_computed_features_go_on_from_any_batch(photos: tuple[str, ...], tmp_path: Path) -> None:
    feed = source(photos, tmp_path, 0)
    whole = list(feed.epoch(5))
    for start in range(4):
        assert_same(list(feed.epoch(5, start)), whole[start:], exactly=True)


def test_the_store_gives_its_space_back(
    photos: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even when the process is killed: the name goes as soon as the file is mapped."""
    sizes, reserve = [], features.reserve
    monkeypatch.setattr(features, "reserve", lambda *a: (sizes.append(a[1]), reserve(*a)))
    feed = source(photos, tmp_path, 2)
    list(feed.epoch(0))
    assert sizes == [2 * NUM_IMAGES * 4 * 8 * 8 * 4]  # views, images, channels, H, W, bytes
    assert feed.store and (features.os.name == "nt" or not feed.store.path.exists())
    feed.close()
    assert not feed.store.path.exists()
    feed.close()


def refused(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "obstacle", ["no room", "full while reserving", "no folder", "more than pays"]
)
def test_without_room_the_features_are_computed_and_it_is_said_once(
    obstacle: str,
    photos: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if obstacle == "no room":
        free = SimpleNamespace(free=features.RESERVED_BYTES)
        monkeypatch.setattr(features.shutil, "disk_usage", lambda _: free)
    elif obstacle == "full while reserving":
        monkeypatch.setattr(features.os, "posix_fallocate", refused, raising=False)
    elif obstacle == "no folder":
        (tmp_path / "store").write_text("a file")
    needed = 2 * NUM_IMAGES * 4 * 8 * 8 * 4
    max_bytes = needed - 1 if obstacle == "more than pays" else needed
    feed = source(photos, tmp_path, 2, max_bytes=max_bytes)
    plain = source(photos, tmp_path / "other", 0)
    first = list(feed.epoch(0))
    assert_same(first, list(plain.epoch(0)), exactly=True)
    list(feed.epoch(1))
    messages = [m for m in caplog.messages if "skipped" not in m]
    assert len(messages) == 1 and "recomputed every epoch" in messages[0]
    assert feed.store is None
    feed.close()


def test_the_store_is_reserved_where_the_system_cannot_allocate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS and Windows have no such call; some shares refuse it."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(features.os, "posix_fallocate", refuse, raising=False)
    for size in (0, 5, (1 << 20) + 1):
        features.reserve(tmp_path / "file", size)
        assert (tmp_path / "file").stat().st_size == size
    monkeypatch.delattr(features.os, "posix_fallocate")
    features.reserve(tmp_path / "file", 7)
    assert (tmp_path / "file").stat().st_size == 7


def test_waiting_for_pixels_is_measured(photos: tuple[str, ...], tmp_path: Path) -> None:
    feed = source(photos, tmp_path, 0)
    assert feed.seconds_waiting == 0
    list(feed.epoch(0))
    assert feed.seconds_waiting > 0


def mobilenet(freeze: int) -> tuple[nn.Module, nn.Module, nn.Module, FrozenPart]:
    model = build_model("mobilenet_v2", 3).eval()
    part, trained = split_model(model, "mobilenet_v2", freeze)
    config = PreprocessConfig(**backbone("mobilenet_v2").preprocessing)
    return model, part, trained, FrozenPart(part, config, CPU, torch.float32, MicroBatch(4))


def sources_of(
    photos: tuple[str, ...], frozen: FrozenPart, folder: Path, **settings: Any
) -> tuple[FeatureSource, FeatureSource]:
    config = TrainingConfig(batch_size=4, cache_images="off", **settings)
    split = Split(photos[:3], LABELS[:3])
    data = FoodData({"a": 0, "b": 1, "c": 2}, split, split, split, [], {})
    nothing = torch.empty(0, dtype=torch.uint8)
    return feature_sources(config, data, frozen, nothing, folder, Processes(), {})


@pytest.mark.slow
@pytest.mark.parametrize(("freeze", "shape"), [(19, (1280, 1, 1)), (1, (32, 112, 112))])
def test_sources_as_a_run_makes_them(
    freeze: int, shape: tuple[int, ...], photos: tuple[str, ...], tmp_path: Path
) -> None:
    """Validation is kept in one view; a wholly frozen network leaves only pooled features."""
    model, part, trained, frozen = mobilenet(freeze)
    before = copy.deepcopy(part.state_dict())
    train, val = sources_of(photos, frozen, tmp_path, num_workers=0, small_epochs=0)
    (batch,) = val.epoch(0)
    assert batch.features.shape == (3, *shape) and batch.num_images == 3
    assert train.store is None and val.store is not None
    pixels = torch.stack(
        [EvalImages(photos, frozen.config)[SampleKey(i, 0, i)].pixels for i in range(3)]
    )
    with torch.no_grad():
        whole = model(normalize(pixels, frozen.config))
        torch.testing.assert_close(trained.eval()(batch.features), whole, atol=1e-4, rtol=1e-3)
    (batch,) = train.epoch(0)
    assert batch.features.shape == (3, *shape), "at 224 pixels"
    assert all(torch.equal(before[key], value) for key, value in part.state_dict().items())
    train.close()
    val.close()


@pytest.mark.parametrize("cache_views", [0, 1])
def test_processes_that_have_nothing_left_to_read_end(
    cache_views: int, photos: tuple[str, ...], tmp_path: Path
) -> None:
    """Those of validation, and of training where its views are kept."""
    sources = sources_of(photos, frozen(), tmp_path, num_workers=1, cache_views=cache_views)
    for source in sources:
        list(source.epoch(0))
    assert len(multiprocessing.active_children()) == (0 if cache_views else 1)
    unfinished = iter(sources[0].loader)  # as the traceback of an error would hold it
    next(unfinished)
    for source in sources:
        source.close()
    assert not multiprocessing.active_children()
