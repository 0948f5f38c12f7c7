"""From what people upload to upright RGB pixels; training and the server open photos here alike."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from app.ml.containers import (
    MAX_PROFILE,
    Container,
    ImageError,
    ImageTooLargeError,
    Probe,
    UnreadableImageError,
    UnsupportedImageError,
    find_orientation,
    read_gif,
    read_png,
    read_webp,
)
from app.ml.heif import HEIF_BRANDS, brands, read_heif
from app.ml.jpeg import read_jpeg

# What files of these formats are called; the content decides what a file is.
IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo"),
    *(".png", ".apng", ".webp", ".gif", ".avif", ".avifs"),
    *(".heic", ".heif", ".heics", ".heifs", ".hif"),
)
# No other decoder is tried: EPS would run Ghostscript, FITS and others are full of bombs.
DECODERS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
    "AVIF": AvifImageFile,
}
IMAGE_FORMATS = (*DECODERS, "HEIC")  # as people are told
# How a photo begins that was packed for a text format or for the way, and as what.
PACKED = {
    b"data:": "a data URL",
    b"/9j/": "base64",
    b"iVBORw0KGgo": "base64",
    b"UklGR": "base64",
    b"R0lGOD": "base64",
    b"\x1f\x8b": "gzip",
}
MAX_ASPECT_RATIO = 20  # 1x10,000 would make "resize the short side to 256" ask for 2 GB
DRAFT_SIDE = 512  # pictures come at the smallest scale whose short side is at least this
SCALES = (8, 4, 2, 1)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
STRIP = 64  # rows of the reduced picture that are made from HEIC at a time

HEIF_BYTES = {400: 3, 420: 5.5, 422: 9}  # by color resolution; 10 without any reduction
CACHED_PROFILE = 1 << 16  # bytes; a camera's or a screen's is smaller, a printing press's is not
SAME_COLOR = 2  # levels of 255 that a profile may differ from sRGB by rounding

ImageSource = str | os.PathLike[str] | bytes | Image.Image


@dataclass(frozen=True)
class Limits:
    """What one picture may cost; what would cost more is refused before it is decoded.

    memory: bytes that decoding takes at its peak. work: blocks of 8x8 samples that the scans of a
    JPEG go through; a core does some 40 million a second. Other formats are decoded once, in a
    time that follows from their memory.
    """

    memory: int
    work: int


SERVING_LIMITS = Limits(memory=296 << 20, work=30_000_000)
TRAINING_LIMITS = Limits(memory=2 << 30, work=300_000_000)


def load_image(source: ImageSource, limits: Limits = SERVING_LIMITS) -> Image.Image:
    """Open, decode fully and stand upright one picture, as RGB.

    EXIF orientation is applied, a color profile is converted to sRGB, transparency is laid on
    white, 16-bit gray is scaled (not clipped), an animation gives its first frame. A large picture
    comes at reduced size, with its short side still at least `DRAFT_SIDE` pixels.

    Raises:
        UnsupportedImageError: none of the formats that are read.
        ImageTooLargeError: over `limits`, seen before decoding.
        UnreadableImageError: empty, truncated or damaged data, or over `MAX_ASPECT_RATIO`.
        OSError: a path that cannot be opened.
    """
    if isinstance(source, Image.Image):
        source.load()
        image, orientation = source.copy(), None
    else:
        container = _read(source if isinstance(source, bytes) else Path(source).read_bytes())
        image, orientation = _decode(container, limits), container.orientation
    if orientation is None:  # told by the decoder
        orientation = find_orientation(image.info.get("exif") or b"", image.info.get("xmp") or b"")
    image = _to_rgb(image)
    if (scale := _scale(image.size)) > 1:  # of no format that is decoded at reduced size
        image = image.reduce(scale)
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _scale(size: tuple[int, int]) -> int:
    """By how much a picture can be reduced with its short side at least `DRAFT_SIDE`."""
    return next((scale for scale in SCALES if min(size) // DRAFT_SIDE >= scale), 1)


# Opening --------------------------------------------------------------------------------------

Reader = Callable[[bytes], Container]


def _read(data: bytes) -> Container:
    """Understand the file by its content, whatever it is called."""
    if not data:
        raise UnreadableImageError("the image file is empty (0 bytes)")
    reader = _reader(data)
    if reader is None:
        if packed := next((PACKED[start] for start in PACKED if data.startswith(start)), None):
            raise UnsupportedImageError(f"not an image but {packed}; give the bytes of the image")
        raise UnsupportedImageError(
            f"not an image in a supported format ({', '.join(IMAGE_FORMATS)})"
        )
    try:
        return reader(data)
    except ImageError:
        raise
    except (LookupError, ValueError, ZeroDivisionError, struct.error) as error:
        raise UnreadableImageError("the image is cut off or damaged at its start") from error


def _reader(data: bytes) -> Reader | None:
    if data.startswith(b"\xff\xd8\xff"):
        return read_jpeg
    if data.startswith(b"\x89PNG"):
        return read_png
    if data.startswith(b"GIF8"):
        return read_gif
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return read_webp
    return read_heif if brands(data) & HEIF_BRANDS else None


def _decode(container: Container, limits: Limits) -> Image.Image:
    """The picture as it is stored, checked against the limits first; its profile in `info`."""
    if container.format == "HEIF":
        return _decode_heif(container.data, limits)
    image, size = _open(container.format, container.data)
    pixels = max(image.width * image.height, container.coded_pixels)
    memory = max(container.coefficients + 4 * pixels, container.pixel_bytes * pixels)
    _check_cost(size, memory + len(container.data), limits)
    if container.work > limits.work:
        raise ImageTooLargeError(
            f"the image is {size[0]}x{size[1]} in {container.scans} scans, which takes as long as "
            f"{container.work:,} blocks; the limit is {limits.work:,}"
        )
    try:
        ends_early = _load(image, container)
    except Exception as error:  # decoders raise nearly anything; AVIF's RuntimeError
        raise UnreadableImageError(f"the image data is damaged: {error}") from error
    if ends_early:
        raise UnreadableImageError("the image data is damaged: it ends before the picture does")
    if container.profile:
        image.info["icc_profile"] = container.profile
    return image if container.clear_color is None else _lay_on_white(image, container)


def _open(format: str, data: bytes) -> tuple[ImageFile.ImageFile, tuple[int, int]]:
    """The picture, still to be loaded (a JPEG at reduced size), and its full size."""
    try:
        image = DECODERS[format](io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"the image has too many pixels: {error}") from error
    except Exception as error:
        raise UnreadableImageError(f"the image is cut off or damaged: {error}") from error
    size = image.size
    if format == "JPEG" and min(size) > DRAFT_SIDE:
        scale = DRAFT_SIDE / min(size)
        image.draft("RGB", (round(size[0] * scale), round(size[1] * scale)))
    return image, size


def _check_cost(size: tuple[int, int], memory: float, limits: Limits) -> None:
    width, height = size
    if memory > limits.memory:
        raise ImageTooLargeError(
            f"the image is {width}x{height} ({width * height / 1e6:.2f} megapixels), which takes "
            f"{-(-memory // 2**20):.0f} MB to decode; the limit is {limits.memory / 2**20:g} MB"
        )
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise UnreadableImageError(
            f"the image is {width}x{height}; one side may be at most {MAX_ASPECT_RATIO} times "
            "the other"
        )


# Damage that decoders let pass ----------------------------------------------------------------


def _load(image: ImageFile.ImageFile, container: Container) -> bool:
    """Decode the picture; whether its data ended before it did."""
    probe = container.probe
    if probe is None:
        image.load()
        return False
    if probe.shows:  # before the picture itself, so that only one is held at a time
        ends_early = _always_the_same(container, probe)
        image.load()
        return ends_early
    image.load()
    may_end_early = probe.suspect or _ends_in_gray(image)
    (filler,) = probe.fillers
    return may_end_early and _altered_pixels(container, probe, filler) != _checksum(image)


def _always_the_same(container: Container, probe: Probe) -> bool:
    """Whether the pixels are the same with all fillers, which the decoder then never reaches."""
    first = _altered_pixels(container, probe, probe.fillers[0])
    return first is not None and all(
        _altered_pixels(container, probe, filler) == first for filler in probe.fillers[1:]
    )


def _altered_pixels(container: Container, probe: Probe, filler: bytes) -> int | None:
    """The checksum of the pixels with the filler in the data; None if they cannot be decoded."""
    data = container.data[: probe.start] + filler + container.data[probe.stop :]
    try:
        image, _ = _open(container.format, data)
        image.load()
    except (OSError, EOFError, SyntaxError, ValueError):
        return None
    return _checksum(image)


def _checksum(image: Image.Image) -> int:
    return zlib.crc32(image.tobytes())


def _ends_in_gray(image: Image.Image) -> bool:
    """Whether the last pixel is as bright as JPEG's middle gray, which it has where data lacks.

    Its color may come from the row above, as colors at half size are interpolated.
    """
    pixel = image.crop((image.width - 1, image.height - 1, *image.size)).tobytes()
    red, green, blue = pixel[:3] if len(pixel) >= 3 else pixel * 3  # or cyan, magenta, yellow
    return 126 <= 0.299 * red + 0.587 * green + 0.114 * blue <= 129


# HEIC -----------------------------------------------------------------------------------------


def _decode_heif(data: bytes, limits: Limits) -> Image.Image:
    """The primary picture, which the decoder turns upright, at reduced size if it is large."""
    try:
        import pillow_heif
    except ImportError as error:
        raise UnsupportedImageError(
            "HEIC photos need the package pillow-heif: pip install pillow-heif, or save the photo "
            "as JPEG"
        ) from error
    try:
        heif = pillow_heif.open_heif(data, convert_hdr_to_8bit=True)
        (width, height), info = heif.size, heif.info  # a damaged file may list no picture at all
    except Exception as error:
        raise UnreadableImageError(f"the image is cut off or damaged: {error}") from error
    _check_cost(heif.size, _heif_bytes(heif.mode, info) * width * height + len(data), limits)
    try:
        image = _reduced(heif.mode, heif.data, heif.size, heif.stride)
    except Exception as error:
        raise UnreadableImageError(f"the image data is damaged: {error}") from error
    if "icc_profile" in info:
        image.info["icc_profile"] = info["icc_profile"]
    return image


def _heif_bytes(mode: str, info: dict[str, Any]) -> float:
    """Memory that decoding takes, a pixel, as measured."""
    deep, clear = info["bit_depth"] > 8, mode.endswith(("A", "a"))
    planes = HEIF_BYTES.get(info.get("chroma", 400), 10)
    return planes * (1.6 if deep else 1) + ((5 if deep else 3) if clear else 0)


def _reduced(mode: str, data: bytes, size: tuple[int, int], stride: int) -> Image.Image:
    """The pixels at the scale that a JPEG of this size would come at, made strip by strip."""
    (width, height), scale = size, _scale(size)
    image = Image.new(mode, (-(-width // scale), -(-height // scale)))
    flat = np.frombuffer(data, np.uint8)
    for top in range(0, height, STRIP * scale):
        rows = min(STRIP * scale, height - top)
        part = flat[top * stride : (top + rows) * stride]
        strip = Image.frombuffer(mode, (width, rows), part, "raw", mode, stride, 1)
        image.paste(strip.reduce(scale), (0, top // scale))
    return image


# Color ----------------------------------------------------------------------------------------


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # gray of 16 bits, which convert("RGB") would clip to white
        profile = image.info.get("icc_profile")
        image = Image.fromarray(np.clip(np.asarray(image) // 257, 0, 255).astype(np.uint8))
        image.info["icc_profile"] = profile
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    image = _to_srgb(image)
    if image.mode == "RGBA":
        # paste() rather than alpha_composite(): that would be one more copy, of 4 bytes a pixel.
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_srgb(image: Image.Image) -> Image.Image:
    """The colors that the profile means; as they are, where it is unusable or means sRGB."""
    profile = image.info.pop("icc_profile", None)
    if not profile or len(profile) > MAX_PROFILE:
        return image
    build = _cached_transform if len(profile) <= CACHED_PROFILE else _transform
    try:
        transform = build(profile, image.mode)
        if transform is None:
            return image
        in_place = transform.output_mode == image.mode
        return ImageCms.applyTransform(image, transform, inPlace=in_place) or image
    except (ImageCms.PyCMSError, OSError):
        return image


def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile's colors to sRGB; None where the two are the same but for rounding."""
    source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    output = "RGB" if mode in ("L", "CMYK") else mode
    transform = ImageCms.buildTransform(source, srgb, mode, output)
    if mode != output:
        return transform
    steps = np.linspace(0, 255, 9, dtype=np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3)
    colors = ImageCms.applyTransform(Image.fromarray(grid).convert(mode), transform)
    assert colors is not None  # as it was not asked for in place
    off = np.abs(np.asarray(colors, np.int16)[..., :3] - grid)
    return transform if off.max() > SAME_COLOR else None


_cached_transform = lru_cache(maxsize=16)(_transform)  # the photos of one phone share a profile


def _lay_on_white(image: Image.Image, container: Container) -> Image.Image:
    """The picture with the pixels of its one clear color white."""
    color, depth = np.array(container.clear_color), container.depth
    if depth == 16 and image.mode == "RGB":  # decoded are the upper 8 bits alone
        lower = PngImageFile(io.BytesIO(container.data))
        lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
        clear = _has_color(image, color >> 8) & _has_color(lower, color & 255)
    elif depth == 16:
        clear = _has_color(image, color)
    else:
        image = image.convert("L") if image.mode == "1" else image
        clear = _has_color(image, color * 255 // (2**depth - 1))
    image = _to_rgb(image)
    image.paste("white", mask=Image.fromarray(clear))
    return image


def _has_color(image: Image.Image, color: NDArray[np.int_]) -> NDArray[np.bool_]:
    """For each pixel, whether it has this color: shape (height, width)."""
    return (np.asarray(image).reshape(image.height, image.width, -1) == color).all(-1)
