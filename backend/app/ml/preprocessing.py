"""From a photo to the pixels the network sees; validation and serving run this very code.

`load_image` opens what people really upload (`images.py`), `PreprocessConfig` is the recipe as
data (stored with every model), `EvalTransform` turns an image into uint8 pixels and `normalize`
turns a batch of those into what the network takes.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from app.ml.containers import (
    ImageError,
    ImageTooLargeError,
    UnreadableImageError,
    UnsupportedImageError,
)
from app.ml.images import (
    DRAFT_SIDE,
    IMAGE_EXTENSIONS,
    IMAGE_FORMATS,
    SERVING_LIMITS,
    TRAINING_LIMITS,
    ImageSource,
    Limits,
    load_image,
)

__all__ = [
    "DRAFT_SIDE",
    "IMAGE_EXTENSIONS",
    "IMAGE_FORMATS",
    "SERVING_LIMITS",
    "TRAINING_LIMITS",
    "EvalTransform",
    "ImageError",
    "ImageSource",
    "ImageTooLargeError",
    "Limits",
    "PreprocessConfig",
    "UnreadableImageError",
    "UnsupportedImageError",
    "load_image",
    "normalize",
    "standardize",
]


@dataclass(frozen=True)
class PreprocessConfig:
    """How a picture becomes network input; written to disk with the model.

    resize: length of the short side, in pixels, before the square `crop` from the center.
    interpolation: "bilinear" or "bicubic". mean, std: of the RGB channels, on a 0-1 scale.
    """

    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PreprocessConfig":
        """Rebuild from JSON; a missing or unknown key is a ValueError that names it."""
        known = {field.name for field in fields(cls)}
        if wrong := known ^ values.keys():
            raise ValueError(f"preprocessing needs exactly {sorted(known)}; wrong: {sorted(wrong)}")
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {**values, "mean": list(self.mean), "std": list(self.std)}


class EvalTransform:
    """The deterministic pipeline of validation and serving: resize, center crop, uint8 pixels."""

    def __init__(self, config: PreprocessConfig) -> None:
        self.config = config
        self.interpolation = InterpolationMode(config.interpolation)

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image -> uint8 (3, crop, crop)."""
        config = self.config
        # torch resizes as Pillow does, but for rounding, in a third of the time, if the colors of a
        # pixel are together. A network wants each color apart: moving bytes takes a quarter of the
        # time that moving the floats of `normalize` does.
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        pixels = F.resize(pixels, [config.resize], interpolation=self.interpolation)
        return F.center_crop(pixels, [config.crop, config.crop]).contiguous()


def normalize(images: Tensor, config: PreprocessConfig) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 of the same shape, zero mean and unit variance per channel."""
    return standardize(images.float().div_(255), config)


def standardize(images: Tensor, config: PreprocessConfig) -> Tensor:
    """Floats in 0-1, (N, 3, H, W) -> the same tensor with each channel's mean and std taken out."""
    mean = torch.tensor(config.mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(config.std, device=images.device).view(1, 3, 1, 1)
    return images.sub_(mean).div_(std)
