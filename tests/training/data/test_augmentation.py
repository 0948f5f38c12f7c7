"""The training pipeline: shapes, ranges, and randomness that follows from numbers alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.ml.model import BACKBONES
from app.ml.preprocessing import PreprocessConfig, normalize
from training.data.augmentation import (
    CROP_RATIO,
    Augmentation,
    color_jitter,
    crop_and_flip,
    draw_augmentation,
    trivial_augment,
)

CONFIGS = [PreprocessConfig(**row.preprocessing) for row in BACKBONES.values()]
CONFIG = CONFIGS[0]
at_least_100 = settings(max_examples=120, deadline=None)
SIDES = st.integers(1, 400)


def pixels(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def to_unit(images: Tensor, config: PreprocessConfig) -> Tensor:
    """Takes the normalising back: values on a 0-1 scale."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    return images * std + mean


@at_least_100
@given(
    height=SIDES,
    width=SIDES,
    key=st.tuples(st.integers(0, 2**31), st.integers(0, 500), st.integers(0, 10**6)),
    config=st.sampled_from(CONFIGS),
    fill=st.sampled_from([None, 0, 255]),
    smallest=st.floats(0.01, 1),
    trivial=st.booleans(),
)
@example(height=1, width=20, key=(0, 0, 0), config=CONFIG, fill=None, smallest=0.08, trivial=True)
@example(height=400, width=20, key=(0, 0, 0), config=CONFIG, fill=255, smallest=1.0, trivial=True)
def test_property_2_augmentation_keeps_shape_and_pixel_range(
    height: int,
    width: int,
    key: tuple[int, int, int],
    config: PreprocessConfig,
    fill: int | None,
    smallest: float,
    trivial: bool,
) -> None:
    image = pixels(height, width, key[2])
    if fill is not None:
        image.fill_(fill)
    augmentation = draw_augmentation(
        height, width, seed=key[0], view=key[1], index=key[2], smallest_crop=smallest
    )
    cropped = crop_and_flip(image, augmentation, 224)
    cropped = trivial_augment(cropped, augmentation.trivial_seed) if trivial else cropped
    assert (cropped.dtype, cropped.shape) == (torch.uint8, (3, 224, 224))
    batch = color_jitter(cropped.unsqueeze(0), torch.tensor([augmentation.color]), config)
    assert (batch.dtype, batch.shape) == (torch.float32, (1, 3, 224, 224))
    assert batch.isfinite().all()
    unit = to_unit(batch, config)
    assert unit.min() >= -1e-5 and unit.max() <= 1 + 1e-5


@at_least_100
@given(draws=st.lists(st.floats(-1, 1), min_size=4, max_size=4), seed=st.integers(0, 99))
def test_the_strongest_colours_stay_in_range_too(draws: list[float], seed: int) -> None:
    unit = to_unit(color_jitter(pixels(9, 9, seed)[None], torch.tensor([draws]), CONFIG), CONFIG)
    assert unit.min() >= -1e-5 and unit.max() <= 1 + 1e-5


@at_least_100
@given(height=SIDES, width=SIDES, index=st.integers(0, 10**6), smallest=st.floats(0.01, 0.6))
def test_the_crop_lies_inside_and_is_as_large_and_wide_as_allowed(
    height: int, width: int, index: int, smallest: float
) -> None:
    box = draw_augmentation(height, width, seed=1, view=2, index=index, smallest_crop=smallest)
    assert 0 <= box.top <= box.top + box.height <= height
    assert 0 <= box.left <= box.left + box.width <= width
    assert box.height > 0 and box.width > 0
    # Sides are rounded to whole pixels, hence the half pixel each way.
    least, most = ((box.width + d) / max(box.height - d, 0.5) for d in (-0.5, 0.5))
    assert most >= CROP_RATIO[0] and least <= CROP_RATIO[1]
    if min(height, width) > 50 and 0.5 < height / width < 2:
        assert box.height * box.width >= 0.95 * smallest * height * width
    assert all(-1 <= draw <= 1 for draw in box.color)


@at_least_100
@given(st.integers(0, 2**40), st.integers(0, 500), st.integers(0, 10**6))
def test_the_draw_follows_from_seed_view_and_image(seed: int, view: int, index: int) -> None:
    def draw(seed: int, view: int, index: int) -> Augmentation:
        return draw_augmentation(300, 256, seed=seed, view=view, index=index, smallest_crop=0.25)

    first = draw(seed, view, index)
    torch.manual_seed(view)
    np.random.default_rng(view).random(9)
    assert draw(seed, view, index) == first
    assert first.color != draw(seed + 1, view, index).color
    assert first.color != draw(seed, view + 1, index).color
    assert first.color != draw(seed, view, index + 1).color


def test_half_of_the_images_are_flipped_and_the_crops_reach_everywhere() -> None:
    draws = [
        draw_augmentation(256, 340, seed=0, view=0, index=i, smallest_crop=0.08)
        for i in range(2000)
    ]
    assert np.mean([draw.flip for draw in draws]) == pytest.approx(0.5, abs=0.04)
    shares = [draw.height * draw.width / (256 * 340) for draw in draws]
    assert min(shares) < 0.1 and max(shares) > 0.9
    # A box of nearly the whole area seldom fits, so the mean is below (0.08 + 1) / 2.
    assert 0.4 < np.mean(shares) < 0.54
    colors = np.array([draw.color for draw in draws])
    assert np.abs(colors.mean(axis=0)).max() < 0.05
    assert colors.std(axis=0) == pytest.approx(np.full(4, 1 / math.sqrt(3)), abs=0.03)


def test_a_flip_is_left_for_right() -> None:
    image = pixels(256, 300)
    box = Augmentation(10, 20, 100, 90, False, (0, 0, 0, 0), 0)
    plain, flipped = (crop_and_flip(image, box._replace(flip=f), 64) for f in (False, True))
    assert torch.equal(flipped, plain.flip(2)) and not torch.equal(flipped, plain)


def test_the_box_is_what_is_cut_out() -> None:
    image = pixels(256, 300)
    box = Augmentation(10, 20, 64, 64, False, (0, 0, 0, 0), 0)
    assert torch.equal(crop_and_flip(image, box, 64), image[:, 10:74, 20:84])


# TrivialAugment -------------------------------------------------------------------------------


@at_least_100
@given(st.integers(0, 2**32 - 1))
def test_the_change_follows_from_its_seed_and_leaves_other_randomness_alone(seed: int) -> None:
    image = pixels(40, 40)
    before, state = image.clone(), torch.get_rng_state()
    changed = trivial_augment(image, seed)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(seed % 7)
    assert torch.equal(trivial_augment(image, seed), changed)
    assert torch.equal(image, before)


def test_most_changes_show_and_hardly_two_are_alike() -> None:
    image = pixels(40, 40)
    seeds = [
        draw_augmentation(40, 40, seed=0, view=view, index=7, smallest_crop=1).trivial_seed
        for view in range(200)
    ]
    changed = [trivial_augment(image, seed) for seed in seeds]
    shown = [one for one in changed if not torch.equal(one, image)]
    assert len(shown) > 120  # one in 14 is none, and some of the mildest do nothing
    assert len({one.numpy().tobytes() for one in shown}) > 100


# Colour ---------------------------------------------------------------------------------------


def jittered(image: Tensor, *draws: float) -> Tensor:
    return to_unit(color_jitter(image[None], torch.tensor([draws]), CONFIG)[0], CONFIG)


@pytest.mark.parametrize("config", CONFIGS)
def test_no_jitter_is_plain_normalising(config: PreprocessConfig) -> None:
    images = torch.stack([pixels(20, 30), pixels(20, 30, seed=1)])
    before = images.clone()
    plain = color_jitter(images, torch.zeros(2, 4), config)
    torch.testing.assert_close(plain, normalize(images, config), atol=2e-5, rtol=1e-5)
    assert torch.equal(images, before)


def test_brightness_contrast_and_saturation_are_the_usual_blends() -> None:
    """Towards black, towards the mean grey, towards each pixel's own grey."""
    image = (pixels(20, 30) // 2) + 60  # so that nothing is clamped
    unit, luma = image / 255, torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    grey = (unit * luma).sum(0)
    close = {"atol": 1e-4, "rtol": 1e-3}
    torch.testing.assert_close(jittered(image, 1, 0, 0, 0), unit * 1.2, **close)
    torch.testing.assert_close(jittered(image, -1, 0, 0, 0), unit * 0.8, **close)
    blend = unit * 0.8 + 0.2 * grey.mean()
    torch.testing.assert_close(jittered(image, 0, -1, 0, 0), blend, **close)
    blend = unit * 0.8 + 0.2 * grey
    torch.testing.assert_close(jittered(image, 0, 0, -1, 0), blend, **close)


def test_the_hue_turns_colours_and_leaves_grey_and_lightness_alone() -> None:
    grey = pixels(20, 30)[:1].expand(3, -1, -1).contiguous()
    torch.testing.assert_close(jittered(grey, 0, 0, 1, 1), grey / 255, atol=2e-3, rtol=0)
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
