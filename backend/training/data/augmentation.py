"""The training pipeline: crop and flip of each image on uint8; color per batch, on the device.

All randomness of an image comes from (seed, view, image number): the same image in the same view
has the same pixels in any process, after any number of others.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from app.ml.preprocessing import PreprocessConfig
from training.config import TrainingConfig

CROP_RATIO = (3 / 4, 4 / 3)  # width / height
COLOR_STRENGTH = (0.2, 0.2, 0.2, 0.05)  # brightness, contrast, saturation; hue in turns
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
TO_YIQ = (LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def augment(
    image: Tensor, crop: int, config: TrainingConfig, view: int, index: int
) -> tuple[Tensor, Tensor]:
    """Crop and flip an image at random, and draw its color jitter.

    Args:
        image: uint8 (3, H, W). config: its settings of augmentation, and the seed.

    Returns:
        Pixels, uint8 (3, crop, crop), and the draws for `color_jitter`, float32 (4,) in -1 to 1.
    """
    rng = np.random.default_rng((config.seed, view, index))
    height, width = image.shape[1:]
    box = _crop_box(height, width, config.min_crop_scale, rng)
    pixels = F.resized_crop(image, *box, [crop, crop], antialias=True)
    if rng.random() < 0.5:
        pixels = F.horizontal_flip(pixels)
    return pixels, torch.from_numpy(rng.uniform(-1, 1, size=4)).float()


def _crop_box(
    height: int, width: int, min_scale: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw top, left, height and width of an Inception-style crop (Szegedy et al. 2015).

    Ten tries, then the largest centered box. As torchvision's RandomResizedCrop, but without its
    tensors of one number each, which cost a quarter of an image's time on a worker.
    """
    log_ratios = np.log(CROP_RATIO)
    for _ in range(10):
        area = height * width * rng.uniform(min_scale, 1)
        ratio = math.exp(rng.uniform(*log_ratios))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return top, left, box_height, box_width
    box_width = min(width, max(1, round(height * CROP_RATIO[1])))
    box_height = min(height, max(1, round(width / CROP_RATIO[0])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def color_jitter(images: Tensor, draws: Tensor, config: PreprocessConfig) -> Tensor:
    """Jitter brightness, contrast, saturation and hue, each image by its own draws; standardize.

    All four are linear in RGB, so one 3x3 matrix and one gray offset per image do them together
    (hue turns the color plane of YIQ, as in NVIDIA DALI's ColorTwist), and the mean and std of
    the channels fold into the same matrix.

    Args:
        images: uint8 (N, 3, H, W). draws: (N, 4) in -1 to 1.

    Returns:
        float32 (N, 3, H, W); before standardizing, the values were clamped to 0-1.
    """
    device = images.device
    pixels = images.flatten(2).float()  # (N, 3, H*W), 0 to 255
    strength = _constant(COLOR_STRENGTH, device)
    brightness, contrast, saturation = (1 + draws * strength)[:, :3].unbind(1)
    matrix = _saturation_and_hue(saturation, draws[:, 3] * COLOR_STRENGTH[3])  # (N, 3, 3)
    matrix = matrix * (brightness * contrast / 255).view(-1, 1, 1)
    mean_gray = pixels.mean(dim=2) @ _constant(LUMA, device) / 255  # (N,)
    gray = (1 - contrast) * brightness * mean_gray
    mean = _constant(tuple(config.mean), device).view(3, 1)
    std = _constant(tuple(config.std), device).view(3, 1)
    offset = (gray.view(-1, 1, 1) - mean) / std  # (N, 3, 1)
    pixels = torch.baddbmm(offset, matrix / std, pixels)
    return pixels.clamp_(-mean / std, (1 - mean) / std).unflatten(2, images.shape[2:])


def _saturation_and_hue(saturation: Tensor, hue_turns: Tensor) -> Tensor:
    """(N,), (N,) -> (N, 3, 3): YIQ with I and Q scaled by saturation and turned by the hue."""
    cos = (2 * math.pi * hue_turns).cos() * saturation
    sin = (2 * math.pi * hue_turns).sin() * saturation
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).view(-1, 3, 3)
    to_yiq, to_rgb = _yiq(saturation.device)
    return to_rgb @ turn @ to_yiq


@functools.cache
def _yiq(device: torch.device) -> tuple[Tensor, Tensor]:
    """The matrices from RGB to YIQ and back; inverting one on a GPU would wait for it."""
    to_yiq = torch.tensor(TO_YIQ)
    return to_yiq.to(device), torch.linalg.inv(to_yiq).to(device)


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers on a device, sent there once: a copy for each batch would wait for it."""
    return torch.tensor(values, device=device)
