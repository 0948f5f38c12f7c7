"""The training pipeline: shapes, ranges, and randomness that follows from numbers alone."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.ml.model import BACKBONES
from app.ml.preprocessing import PreprocessConfig, normalize
from training.config import TrainingConfig
from training.data.augmentation import CROP_RATIO, augment, color_jitter

CONFIGS = [PreprocessConfig(**row.preprocessing) for row in BACKBONES.values()]
CONFIG = CONFIGS[0]
at_least_100 = settings(max_examples=120, deadline=None)
SIDES = st.integers(1, 400)


def pixels(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def to_unit(images: Tensor, config: PreprocessConfig) -> Tensor:
    """Undo the normalization: values on a 0-1 scale."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    return images * std + mean


def coordinates(height: int, width: int) -> Tensor:
    """An image whose pixels say where they are: column in channel 0, row in channel 1."""
    columns, rows = torch.arange(width), torch.arange(height)
    image = [
        columns.expand(height, -1),
        rows[:, None].expand(-1, width),
        torch.zeros(height, width),
    ]
    return torch.stack(image).byte()


class Box(NamedTuple):
    """What was cut out of an image of `coordinates`, in its pixels, and whether it was flipped."""

    top: float
    left: float
    height: float
    width: float
    flipped: bool


def crops(min_scale: float, seed: int) -> TrainingConfig:
    return TrainingConfig(min_crop_scale=min_scale, seed=seed)


def box_of(height: int, width: int, *, min_scale: float, index: int, crop: int = 64) -> Box:
    seen, _ = augment(coordinates(height, width), crop, crops(min_scale, 1), view=2, index=index)
    columns, rows = seen[0, 0].double(), seen[1, :, 0].double()
    a, b = crop // 8, crop - 1 - crop // 8  # away from the edges, where resizing is not linear
    across, down = (columns[b] - columns[a]) / (b - a), (rows[b] - rows[a]) / (b - a)
    top = rows[a] + 0.5 - (a + 0.5) * down
    left = (
        columns[a] + 0.5 - (a + 0.5) * across
        if across > 0
        else columns[b] + 0.5 + (crop - b - 0.5) * across
    )
    return Box(
        float(top), float(left), float(down) * crop, abs(float(across)) * crop, bool(across < 0)
    )


@at_least_100
@given(
    height=SIDES,
    width=SIDES,
    key=st.tuples(st.integers(0, 2**31), st.integers(0, 500), st.integers(0, 10**6)),
    config=st.sampled_from(CONFIGS),
    fill=st.sampled_from([None, 0, 255]),
    min_scale=st.floats(0.01, 0.999),
)
@example(height=1, width=20, key=(0, 0, 0), config=CONFIG, fill=None, min_scale=0.08)
@example(height=400, width=20, key=(0, 0, 0), config=CONFIG, fill=255, min_scale=0.99)
def test_property_2_augmentation_keeps_shape_and_pixel_range(
    height: int,
    width: int,
    key: tuple[int, int, int],
    config: PreprocessConfig,
    fill: int | None,
    min_scale: float,
) -> None:
    image = pixels(height, width, key[2])
    if fill is not None:
        image.fill_(fill)
    seed, view, index = key
    cropped, color = augment(image, 224, crops(min_scale, seed), view, index)
    assert (cropped.dtype, cropped.shape) == (torch.uint8, (3, 224, 224))
    assert (color.dtype, color.shape) == (torch.float32, (4,)) and color.abs().max() <= 1
    batch = color_jitter(cropped[None], color[None], config)
    assert (batch.dtype, batch.shape) == (torch.float32, (1, 3, 224, 224))
    assert batch.isfinite().all()
    unit = to_unit(batch, config)
    assert unit.min() >= -1e-5 and unit.max() <= 1 + 1e-5


@at_least_100
@given(draws=st.lists(st.floats(-1, 1), min_size=4, max_size=4), seed=st.integers(0, 99))
def test_the_strongest_colors_stay_in_range_too(draws: list[float], seed: int) -> None:
    unit = to_unit(color_jitter(pixels(9, 9, seed)[None], torch.tensor([draws]), CONFIG), CONFIG)
    assert unit.min() >= -1e-5 and unit.max() <= 1 + 1e-5


@at_least_100
@given(
    height=st.integers(100, 256),
    width=st.integers(100, 256),
    index=st.integers(0, 10**6),
    min_scale=st.floats(0.1, 0.6),
)
def test_the_crop_lies_inside_and_is_as_large_and_wide_as_allowed(
    height: int, width: int, index: int, min_scale: float
) -> None:
    box = box_of(height, width, min_scale=min_scale, index=index)
    pixel = 1.5  # coordinates are rounded to whole numbers, here and there
    assert box.top > -pixel and box.top + box.height < height + pixel
    assert box.left > -pixel and box.left + box.width < width + pixel
    least, most = ((box.width + d) / (box.height - d) for d in (-2 * pixel, 2 * pixel))
    assert most >= CROP_RATIO[0] and least <= CROP_RATIO[1]
    area = (box.height + 2 * pixel) * (box.width + 2 * pixel)
    assert area >= min_scale * height * width or max(height, width) > 2 * min(height, width)


@at_least_100
@given(st.integers(0, 2**40), st.integers(0, 500), st.integers(0, 10**6))
def test_the_view_follows_from_seed_view_and_image(seed: int, view: int, index: int) -> None:
    image = pixels(60, 50)
    before, state = image.clone(), torch.get_rng_state()
    cropped, color = augment(image, 32, crops(0.25, seed), view, index)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(image, before)
    torch.manual_seed(view)
    np.random.default_rng(view).random(9)
    again, color_again = augment(image, 32, crops(0.25, seed), view, index)
    assert torch.equal(again, cropped) and torch.equal(color_again, color)
    for other in ((seed + 1, view, index), (seed, view + 1, index), (seed, view, index + 1)):
        assert not torch.equal(augment(image, 32, crops(0.25, other[0]), *other[1:])[1], color)


def test_a_view_stays_what_it_was_when_a_run_began() -> None:
    """A run that is resumed with a later version of this code continues with the same views."""
    cropped, color = augment(coordinates(200, 250), 4, crops(0.25, 42), view=3, index=7)
    assert cropped[:2, 1, 1].tolist() == pytest.approx([58, 127], abs=1)
    assert color.tolist() == pytest.approx([0.0132, 0.2082, 0.5405, -0.315], abs=1e-4)


@pytest.mark.slow
def test_half_of_the_images_are_flipped_and_the_crops_reach_everywhere() -> None:
    boxes = [box_of(192, 256, min_scale=0.08, index=i, crop=32) for i in range(1500)]
    assert np.mean([box.flipped for box in boxes]) == pytest.approx(0.5, abs=0.04)
    shares = [box.height * box.width / (192 * 256) for box in boxes]
    assert min(shares) < 0.1 and max(shares) > 0.9
    # A box of nearly the whole area seldom fits, so the mean is below (0.08 + 1) / 2.
    assert 0.4 < np.mean(shares) < 0.54


def test_the_color_draws_are_uniform() -> None:
    image = pixels(4, 4)
    colors = np.array([augment(image, 4, crops(0.25, 0), 0, i)[1].numpy() for i in range(2000)])
    assert np.abs(colors.mean(axis=0)).max() < 0.05
    assert colors.std(axis=0) == pytest.approx(np.full(4, 1 / math.sqrt(3)), abs=0.03)


def test_a_flip_is_left_for_right_and_nothing_else() -> None:
    """A square that only the whole of fits: what is seen is the image, or its mirror image."""
    image = pixels(30, 30)
    seen = [augment(image, 30, crops(0.999, 0), view, 0)[0] for view in range(200)]
    whole = [s for s in seen if torch.equal(s, image)]
    mirrored = [s for s in seen if torch.equal(s, image.flip(2))]
    assert whole and mirrored


# Color ----------------------------------------------------------------------------------------


def jittered(image: Tensor, *draws: float) -> Tensor:
    return to_unit(color_jitter(image[None], torch.tensor([draws]), CONFIG)[0], CONFIG)


@pytest.mark.parametrize("config", CONFIGS)
def test_no_jitter_is_plain_normalization(config: PreprocessConfig) -> None:
    images = torch.stack([pixels(20, 30), pixels(20, 30, seed=1)])
    before = images.clone()
    plain = color_jitter(images, torch.zeros(2, 4), config)
    torch.testing.assert_close(plain, normalize(images, config), atol=2e-5, rtol=1e-5)
    assert torch.equal(images, before)


def test_brightness_contrast_and_saturation_are_the_usual_blends() -> None:
    """Towards black, towards the mean gray, towards each pixel's own gray."""
    image = (pixels(20, 30) // 2) + 60  # so that nothing is clamped
    unit, luma = image / 255, torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    gray = (unit * luma).sum(0)
    close = {"atol": 1e-4, "rtol": 1e-3}
    torch.testing.assert_close(jittered(image, 1, 0, 0, 0), unit * 1.2, **close)
    torch.testing.assert_close(jittered(image, -1, 0, 0, 0), unit * 0.8, **close)
    blend = unit * 0.8 + 0.2 * gray.mean()
    torch.testing.assert_close(jittered(image, 0, -1, 0, 0), blend, **close)
    blend = unit * 0.8 + 0.2 * gray
    torch.testing.assert_close(jittered(image, 0, 0, -1, 0), blend, **close)


def test_the_hue_turns_colors_and_leaves_gray_and_lightness_alone() -> None:
    gray = pixels(20, 30)[:1].expand(3, -1, -1).contiguous()
    torch.testing.assert_close(jittered(gray, 0, 0, 1, 1), gray / 255, atol=2e-3, rtol=0)
    image, luma = pixels(20, 30) // 4 + 90, torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    turned = jittered(image, 0, 0, 0, 1)
    assert (turned - image / 255).abs().max() > 0.02
    torch.testing.assert_close(
        (turned * luma).sum(0), (image / 255 * luma).sum(0), atol=2e-3, rtol=0
    )


@at_least_100
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_an_image_is_jittered_alike_in_any_company(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 8, 9), dtype=torch.uint8, generator=generator)
    draws = torch.rand(count, 4, generator=generator) * 2 - 1
    together = color_jitter(images, draws, CONFIG)
    for i in range(count):
        alone = color_jitter(images[i : i + 1], draws[i : i + 1], CONFIG)
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-5, rtol=1e-5)
