"""The recipe that travels with a model, and that serving and validation follow the same."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.support.pictures import (
    encoded,
    exif,
    noise,
    orientation_tag,
    resized_by_pillow,
    rgb_profile,
)

from app.ml.model import BACKBONES
from app.ml.predictor import FoodPredictor
from app.ml.preprocessing import EvalTransform, PreprocessConfig, normalize, standardize
from training.data.loader import EvalImages, SampleKey

CONFIG = PreprocessConfig(256, 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# The recipe -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_each_backbones_recipe_survives_json(name: str) -> None:
    config = PreprocessConfig(**BACKBONES[name].preprocessing)
    assert PreprocessConfig.from_dict(config.to_dict()) == config
    pixels = EvalTransform(config)(noise(300, 280))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, config.crop, config.crop))
    assert pixels.is_contiguous()  # the floats would be moved later, in four times the time


@settings(max_examples=100, deadline=None)
@given(st.sets(st.sampled_from(sorted(CONFIG.to_dict()))), st.sets(st.text(max_size=8)))
def test_a_missing_or_unknown_key_is_named(missing: set[str], unknown: set[str]) -> None:
    unknown -= CONFIG.to_dict().keys()
    values = {k: v for k, v in CONFIG.to_dict().items() if k not in missing}
    values |= dict.fromkeys(unknown, 1)
    if not missing and not unknown:
        assert PreprocessConfig.from_dict(values) == CONFIG
        return
    with pytest.raises(ValueError, match="preprocessing needs exactly") as raised:
        PreprocessConfig.from_dict(values)
    assert all(repr(key) in str(raised.value) for key in missing | unknown)


def test_the_crop_is_the_center_of_the_resized_picture() -> None:
    """The short side becomes 256, then 16 pixels go on each side of it."""
    picture = np.zeros((512, 1024, 3), dtype=np.uint8)
    picture[:, 512:] = 255  # the edge is in the middle
    pixels = EvalTransform(CONFIG)(Image.fromarray(picture))
    assert pixels.shape == (3, 224, 224)
    assert (pixels[:, :, :110] == 0).all() and (pixels[:, :, 114:] == 255).all()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(512, 384), (211, 340), (60, 45), (1023, 600)])
def test_it_resizes_as_pillow_does_but_for_rounding(
    interpolation: str, size: tuple[int, int]
) -> None:
    config = dataclasses.replace(CONFIG, crop=256, interpolation=interpolation)
    image = noise(*size)
    differences = (EvalTransform(config)(image) - resized_by_pillow(image, config).int()).abs()
    assert differences.max() <= 2 and differences.float().mean() < 0.01


def test_normalize_is_the_textbook_formula() -> None:
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    before = images.clone()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CONFIG.mean, CONFIG.std))
    torch.testing.assert_close(normalize(images, CONFIG), (images / 255 - mean) / std)
    torch.testing.assert_close(standardize(images / 255, CONFIG), (images / 255 - mean) / std)
    assert torch.equal(images, before)


MODES = [
    *(("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "WEBP"), ("RGBA", "WEBP")),
    *(("RGB", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("L", "PNG")),
]


@st.composite
def photos(draw: st.DrawFn) -> tuple[bytes, str]:
    """A picture as it may be uploaded: any shape, mode, format, orientation and color profile."""
    mode, format = draw(st.sampled_from(MODES))
    side = draw(st.integers(1, 300))
    other = draw(st.integers(max(1, side // 8), min(700, side * 8)))
    size = draw(st.permutations([side, other]))
    orientation = draw(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]))
    image = noise(size[0], size[1], mode, seed=draw(st.integers(0, 99)))
    options: dict[str, Any] = {"exif": exif([orientation_tag(orientation)])}
    if mode in ("RGB", "RGBA") and draw(st.booleans()):
        options["icc_profile"] = rgb_profile()
    return encoded(image, format, **options), format.lower()


CONFIGS = st.builds(
    PreprocessConfig,
    resize=st.sampled_from([48, 232, 256]),
    crop=st.sampled_from([32, 48, 224]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    mean=st.just(CONFIG.mean),
    std=st.just(CONFIG.std),
)


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(photo=photos(), config=CONFIGS)
def test_property_6_serving_sees_what_validation_saw(
    photo: tuple[bytes, str], config: PreprocessConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data, ending = photo
    path = tmp_path_factory.mktemp("photo") / f"photo.{ending}"
    path.write_bytes(data)
    item = EvalImages((str(path),), config)[SampleKey(0, 0, 0)]
    record: Any = SimpleNamespace(preprocessing=config, classes=["a"], decision_of=lambda _: None)
    network: Any = None  # nothing is asked of it here
    served = FoodPredictor(record, network, centroids=torch.eye(2))
    assert item.pixels is not None and item.problem is None
    assert item.pixels.shape == (3, config.crop, config.crop)
    for source in (data, path, str(path), Image.open(path)):
        assert torch.equal(served.preprocess(source), item.pixels)
