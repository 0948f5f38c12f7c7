"""The training pipeline: random crop, flip and, if asked for, one more change per image on uint8;
colour per batch on the device.

All randomness of an image comes from (seed, view, image number) and nothing else: no worker's
stream, no order. So the same image in the same view is the same pixels, in any process.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import TrivialAugmentWide
from torchvision.transforms.v2 import functional as F

from app.ml.preprocessing import PreprocessConfig

CROP_RATIO = (3 / 4, 4 / 3)  # width / height
COLOR_STRENGTH = (0.2, 0.2, 0.2, 0.05)  # brightness, contrast, saturation; hue in turns
LUMA = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601
TRIVIAL_AUGMENT = TrivialAugmentWide()


class Augmentation(NamedTuple):
    """What happens to one image: a box in pixels, a flip, four colour draws in -1 to 1, and the
    seed of TrivialAugment's choice."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    color: tuple[float, float, float, float]
    trivial_seed: int


def draw_augmentation(
    height: int, width: int, *, seed: int, view: int, index: int, smallest_crop: float
) -> Augmentation:
    """Draw for one image of this size; the same arguments always give the same answer.

    smallest_crop: share of the picture's area that is shown at least.
    """
    random = np.random.default_rng((seed, view, index))
    top, left, box_height, box_width = _crop_box(height, width, smallest_crop, random)
    flip = bool(random.random() < 0.5)
    brightness, contrast, saturation, hue = random.uniform(-1, 1, size=4).tolist()
    color = (brightness, contrast, saturation, hue)
    trivial_seed = int(random.integers(2**32))
    return Augmentation(top, left, box_height, box_width, flip, color, trivial_seed)


def _crop_box(
    height: int, width: int, smallest: float, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Inception-style crop (Szegedy et al. 2015): ten tries, then the largest allowed centre."""
    for _ in range(10):
        area = height * width * random.uniform(smallest, 1)
        ratio = math.exp(random.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(random.integers(height - box_height + 1))
            left = int(random.integers(width - box_width + 1))
            return top, left, box_height, box_width
    box_width = min(width, max(1, round(height * CROP_RATIO[1])))
    box_height = min(height, max(1, round(width / CROP_RATIO[0])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def crop_and_flip(image: Tensor, augmentation: Augmentation, size: int) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, size, size)."""
    top, left, height, width, flip, *_ = augmentation
    image = F.resized_crop(image, top, left, height, width, [size, size], antialias=True)
    return F.horizontal_flip(image) if flip else image


def trivial_augment(image: Tensor, seed: int) -> Tensor:
    """One of 14 changes (shift, turn, shear, light, colour, sharpness and such), of any strength.

    TrivialAugment (Müller and Hutter 2021) in its wide form. As a PIL image it takes half as long
    as a tensor does.

    Args:
        image: uint8 (3, H, W). seed: the same one always gives the same change.

    Returns:
        uint8 (3, H, W).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for the GPU
        return F.pil_to_tensor(TRIVIAL_AUGMENT(F.to_pil_image(image)))


def color_jitter(images: Tensor, draws: Tensor, config: PreprocessConfig) -> Tensor:
    """Jitter brightness, contrast, saturation and hue, each image by its own draws; standardize.

    All four are linear in RGB, so one 3x3 matrix and one grey offset per image do them together
    (hue turns the colour plane of YIQ, as in NVIDIA DALI's ColorTwist), and the mean and std of
    the channels fold into the same matrix.

    Args:
        images: uint8 (N, 3, H, W). draws: (N, 4) in -1 to 1.

    Returns:
        float32 (N, 3, H, W); before standardizing, the values were clamped to 0-1.
    """
    pixels = images.flatten(2).float()  # (N, 3, H*W), 0 to 255
    strength = torch.tensor(COLOR_STRENGTH, device=draws.device)
    brightness, contrast, saturation = (1 + draws * strength)[:, :3].unbind(1)
    matrix = _saturation_and_hue(saturation, draws[:, 3] * strength[3])  # (N, 3, 3)
    matrix = matrix * (brightness * contrast / 255).view(-1, 1, 1)
    mean_grey = pixels.mean(dim=2) @ LUMA.to(draws.device) / 255  # (N,)
    grey = (1 - contrast) * brightness * mean_grey
    mean = torch.tensor(config.mean, device=draws.device).view(3, 1)
    std = torch.tensor(config.std, device=draws.device).view(3, 1)
    offset = (grey.view(-1, 1, 1) - mean) / std  # (N, 3, 1)
    pixels = torch.baddbmm(offset, matrix / std, pixels)
    return pixels.clamp_(-mean / std, (1 - mean) / std).unflatten(2, images.shape[2:])


def _saturation_and_hue(saturation: Tensor, hue_turns: Tensor) -> Tensor:
    """(N,), (N,) -> (N, 3, 3): YIQ with I and Q scaled by saturation and turned by the hue."""
    to_yiq = torch.tensor(
        [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]],
        device=saturation.device,
    )
    cos = (2 * math.pi * hue_turns).cos() * saturation
    sin = (2 * math.pi * hue_turns).sin() * saturation
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).view(-1, 3, 3)
    return torch.linalg.inv(to_yiq) @ turn @ to_yiq
