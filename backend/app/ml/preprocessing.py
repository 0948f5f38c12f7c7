"""From a photo to the pixels the network sees; validation and serving run this very code.

`load_image` opens what people really upload, `PreprocessConfig` is the recipe as data (stored with
every model), `EvalTransform` turns an image into uint8 pixels and `normalize` turns a batch of
those into what the network takes.
"""

import io
import os
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

# What Image.open may try. The list keeps EPS (runs Ghostscript), FITS and other bomb-prone
# decoders out. The JPEG decoder also opens MPO, the multi-picture JPEG that many phones write.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")
IMAGE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8")
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".mpo", ".png", ".webp", ".gif", ".avif")

MAX_PIXELS = 12_500_000  # a phone's 12.2 Mpx; WebP with alpha takes 19 bytes a pixel to decode
MAX_JPEG_PIXELS = 64_000_000  # a JPEG is decoded at reduced size, so phone panoramas may pass
MAX_PROGRESSIVE_PIXELS = 25_000_000  # a progressive one is held whole all the same, 8 bytes a pixel
MAX_ASPECT_RATIO = 20  # 1x10,000 would make "resize the short side to 256" ask for 2 GB
DRAFT_SIDE = 512  # a JPEG is decoded at the smallest scale whose short side is at least this

ImageSource = str | os.PathLike[str] | bytes | Image.Image


class ImageError(ValueError):
    """A picture that cannot be used; the message says why in words a user can act on."""


class UnreadableImageError(ImageError):
    """An image format we know, but the data is damaged, empty or of an unusable shape."""


class UnsupportedImageError(ImageError):
    """Not an image, or in a format that is not on the list."""


class ImageTooLargeError(ImageError):
    """More pixels than we are willing to decode."""


def load_image(source: ImageSource) -> Image.Image:
    """Open, decode fully and stand upright one picture, as RGB.

    EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled (not
    clipped), an animation gives its first frame. A large JPEG is decoded at reduced size, with
    its short side still at least `DRAFT_SIDE` pixels.

    Raises:
        UnsupportedImageError: not one of `IMAGE_FORMATS`.
        ImageTooLargeError: over `MAX_PIXELS` (JPEG: `MAX_JPEG_PIXELS`), seen in the header.
        UnreadableImageError: empty, truncated or damaged data, or over `MAX_ASPECT_RATIO`.
        OSError: a path that cannot be opened.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source)
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    if not data:
        raise UnreadableImageError("the image file is empty (0 bytes)")
    with _open(data) as image:
        _check_size(image)
        image.draft("RGB", _draft_size(image.size))
        try:
            return _to_rgb(image)
        except Exception as error:  # decoders raise nearly anything; AVIF's RuntimeError
            raise UnreadableImageError(f"the image data is damaged: {error}") from error


def _open(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns above 89 Mpx and about odd metadata; _check_size decides on the first,
            # and the second does not matter for the pixels.
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"the image has too many pixels: {error}") from error
    except Image.UnidentifiedImageError as error:
        if data.startswith(IMAGE_MAGIC):
            raise UnreadableImageError("the image is cut off or damaged at its start") from error
        raise UnsupportedImageError(
            f"not an image in a supported format ({', '.join(IMAGE_FORMATS)})"
        ) from error
    except Exception as error:
        raise UnreadableImageError(f"the image header is damaged: {error}") from error


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    limit = MAX_PIXELS
    if image.format in ("JPEG", "MPO"):
        limit = MAX_PROGRESSIVE_PIXELS if "progressive" in image.info else MAX_JPEG_PIXELS
    if width * height > limit:
        raise ImageTooLargeError(
            f"the image is {width}x{height} = {width * height / 1e6:.0f} megapixels; "
            f"the limit for this kind of {image.format} is {limit / 1e6:g}"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise UnreadableImageError(
            f"the image is {width}x{height}; one side may be at most {MAX_ASPECT_RATIO} times "
            "the other"
        )


def _draft_size(size: tuple[int, int]) -> tuple[int, int]:
    scale = DRAFT_SIDE / min(size)
    return (round(size[0] * scale), round(size[1] * scale)) if scale < 1 else size


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    image = _upright(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        # convert("RGB") would clip 16 bit to white.
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.has_transparency_data:
        # paste() rather than alpha_composite(), and no conversion of what is RGB already: each
        # would be one more copy, of 4 bytes a pixel.
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says; unreadable EXIF counts as none."""
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return image


@dataclass(frozen=True)
class PreprocessConfig:
    """How a picture becomes network input; written to disk with the model.

    resize: length of the short side, in pixels, before the square `crop` from the centre.
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
    """The deterministic pipeline of validation and serving: resize, centre crop, uint8 pixels."""

    def __init__(self, config: PreprocessConfig) -> None:
        self.config = config
        self.interpolation = InterpolationMode(config.interpolation)

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image -> uint8 (3, crop, crop)."""
        config = self.config
        image = F.resize(image, [config.resize], interpolation=self.interpolation)
        return F.pil_to_tensor(F.center_crop(image, [config.crop, config.crop]))


def normalize(images: Tensor, config: PreprocessConfig) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 of the same shape, zero mean and unit variance per channel."""
    return standardize(images.float().div_(255), config)


def standardize(images: Tensor, config: PreprocessConfig) -> Tensor:
    """Floats in 0-1, (N, 3, H, W) -> the same tensor with each channel's mean and std taken out."""
    mean = torch.tensor(config.mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(config.std, device=images.device).view(1, 3, 1, 1)
    return images.sub_(mean).div_(std)
