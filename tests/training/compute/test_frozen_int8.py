"""The frozen layers in integers: where they are taken, and who sees them."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import standin
from tests.support.runs import draw_photos
from torch import Tensor, nn

from app.ml.model import build_model, split_model
from training.compute import frozen_int8, quantization
from training.compute.distributed import Processes
from training.compute.features import FeatureSource, FrozenPart, feature_sources
from training.compute.frozen_int8 import MIN_BATCHES, int8_if_faster, may_pay
from training.compute.memory import MicroBatch
from training.compute.tracing import trace
from training.config import TrainingConfig
from training.data.loader import Batch
from training.data.splits import FoodData, Split

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYERS = nn.Sequential(nn.Conv2d(3, 4, 3))
NUM_IMAGES = 6
COMPARE = frozen_int8.compare
NONE = torch.zeros(0, dtype=torch.int64)


@pytest.fixture(scope="module")
def layers() -> nn.Module:
    torch.manual_seed(0)
    with standin.registered():
        return split_model(build_model(standin.NAME, 3), standin.NAME, 3)[0]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    photos = draw_photos(tmp_path_factory.mktemp("int8"), per_class=2)
    paths = tuple(map(str, sorted(photos.rglob("*.jpg"))))
    return Split(paths, np.arange(NUM_IMAGES) % 3)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with the instructions, where integers take half of the time."""
    standin.register()
    monkeypatch.setattr(frozen_int8, "has_vnni", lambda: True)
    monkeypatch.setattr(frozen_int8, "compare", lambda *_: (2.0, 1.0))


def settings(**changes: Any) -> TrainingConfig:
    chosen = {"batch_size": 2, "epochs": MIN_BATCHES, "cache_images": "off", **changes}
    return TrainingConfig(model_name=standin.NAME, num_workers=0, **chosen)


def part(layers: nn.Module, dtype: torch.dtype = torch.float32) -> FrozenPart:
    return FrozenPart(layers, settings().preprocessing, CPU, dtype, MicroBatch(64))


def quantized(layers: nn.Module, split: Split) -> Tensor:
    return int8_if_faster(layers, part(layers), settings(), split, {})


def test_it_is_tried_for_a_long_training_on_a_cpu_with_the_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, num_images = settings(), 2
    assert may_pay(LAYERS, CPU, config, num_images)
    assert not may_pay(LAYERS, CUDA, config, num_images)
    assert not may_pay(nn.Sequential(), CPU, config, num_images)
    for changes in (
        {"epochs": MIN_BATCHES - 1},
        {"cache_views": MIN_BATCHES - 1},
        {"model_name": "timm/test_resnet"},
    ):
        assert not may_pay(LAYERS, CPU, replace(config, **changes), num_images), changes
    monkeypatch.setattr(frozen_int8, "has_vnni", lambda: False)
    assert not may_pay(LAYERS, CPU, config, num_images)


@pytest.mark.parametrize(("int8", "pays"), [(8.9, True), (9.1, False)])
def test_it_is_taken_where_it_is_clearly_faster_and_one_line_says_so(
    int8: float,
    pays: bool,
    layers: nn.Module,
    split: Split,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(frozen_int8, "compare", lambda *_: (10.0, int8))
    assert bool(len(quantized(layers, split))) == pays
    form = "in int8" if pays else "stay as they are"
    (line,) = caplog.messages
    size = settings().sizes["train_crop"]
    images = f"6 images of {size} pixels take 10 ms as they are, 9 ms in int8"
    assert line.startswith(f"frozen layers {form}: {images} (error 0.0")


def test_what_is_timed_has_the_size_of_the_last_epochs(
    layers: nn.Module, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    monkeypatch.setattr(frozen_int8, "WORTHWHILE", 100)
    monkeypatch.setattr(
        frozen_int8, "compare", lambda _, __, batch: sizes.append(batch.images.shape) or (1.0, 1.0)
    )
    config = replace(settings(), first_crop=32, train_crop=64, small_epochs=4)
    assert len(int8_if_faster(layers, part(layers), config, split, {}))
    assert sizes == [(6, 3, 64, 64)]


def test_it_is_not_taken_where_the_features_differ(
    layers: nn.Module, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a network computes its padding, and that is rounded too."""

    def quantize_another(_: bytes, pixels: Tensor) -> bytes:
        other = split_model(build_model(standin.NAME, 3), standin.NAME, 3)[0]
        return quantization.quantize(trace(other, pixels.shape[-1], "features"), pixels)

    monkeypatch.setattr(frozen_int8, "quantize", quantize_another)
    assert not len(quantized(layers, split))


def test_layers_that_cannot_be_quantized_stay_as_they_are(
    layers: nn.Module,
    split: Split,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no such operator")

    monkeypatch.setattr(frozen_int8, "quantize", fail)
    assert not len(quantized(layers, split))
    (line,) = caplog.messages
    assert line.endswith("not quantized: no such operator")


def test_both_are_timed_and_the_plain_layers_come_first() -> None:
    def taking(seconds: float) -> Any:
        return lambda _: time.sleep(seconds)

    plain, int8 = COMPARE(taking(0.004), taking(0), Batch(NONE, None, NONE, NONE, []))
    assert int8 < 3 < 4 <= plain, "milliseconds"


def test_only_training_images_go_through_the_integers(
    layers: nn.Module, split: Split, tmp_path: Path
) -> None:
    """In the plain layers' format, whatever of a batch could be read."""
    data = FoodData({"a": 0, "b": 1, "c": 2}, split, split, split, [], {})
    plain, file = part(layers), quantized(layers, split)

    def features(int8: Tensor) -> list[Tensor]:
        sources = feature_sources(settings(), data, plain, int8, tmp_path, Processes(), {})
        return [all_of(source) for source in sources]

    def all_of(source: FeatureSource) -> Tensor:
        found = torch.cat([batch.features for batch in source.epoch(0)])
        source.close()
        return found

    (train, val), (train_int8, val_int8) = features(file[:0]), features(file)
    assert torch.equal(val, val_int8)
    error = (train - train_int8).norm() / train.norm()
    assert 0 < error < 0.05
    empty = Batch(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), None, NONE, NONE, [])
    for dtype in (torch.float32, torch.bfloat16):
        found, expected = part(layers, dtype).in_int8(file)(empty), part(layers, dtype)(empty)
        assert found.shape == expected.shape and found.dtype == dtype


def test_a_run_that_continues_on_a_gpu_says_that_it_rounds_otherwise(
    layers: nn.Module, split: Split, caplog: pytest.LogCaptureFixture
) -> None:
    on_gpu = part(layers)
    on_gpu.device = CUDA
    assert on_gpu.in_int8(quantized(layers, split)) is on_gpu
    assert "rounding differs" in caplog.messages[-1]
