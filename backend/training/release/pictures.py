"""Small pictures for the pages, and what is laid over them to show where a network looked.

It is clear where the network found its evidence and dark elsewhere, as on the server's page, so
that nobody has to tell colors apart. Pages hold pictures as data URIs.
"""

import base64
import io
from collections.abc import Callable
from typing import TypedDict

import numpy as np
from PIL import Image, ImageOps

from app.ml.activation import ActivationMap
from app.ml.preprocessing import TRAINING_LIMITS, ImageError, load_image

THUMBNAIL_SIZE = 180  # pixels; a few more than shown, so that phones with dense screens look sharp
PREVIEW_SIZE = 300
JPEG_QUALITY = 80
HEAT_SIZE = 32  # pixels, which browsers smooth; a network tells 7 to 10 places apart
DARKEST, CONTRAST = 0.75, 1.5  # as in app/web/app.js

Look = Callable[[Image.Image], ActivationMap]  # where a network looked at a picture


class Picture(TypedDict):
    """A photo as a data URI, None if it is gone, and its size in pixels; heat: what to lay over it,
    None without a map."""

    photo: str | None
    width: int
    height: int
    heat: str | None


def picture_of(
    file: str, shape: Callable[[Image.Image], Image.Image], look: Look | None = None
) -> Picture:
    """Encode a photo, small: `shape` is `square` or `whole`."""
    try:
        image = load_image(file, TRAINING_LIMITS)
    except (ImageError, OSError):  # moved or deleted since: the page says so
        return {"photo": None, "width": 0, "height": 0, "heat": None}
    small = shape(image)
    return {
        "photo": data_uri(small, "JPEG", quality=JPEG_QUALITY),
        "width": small.width,
        "height": small.height,
        "heat": heat_of(look(image), small.size) if look else None,
    }


def square(image: Image.Image) -> Image.Image:
    """Cut out the square center, about what the network sees."""
    return ImageOps.fit(image, (THUMBNAIL_SIZE, THUMBNAIL_SIZE))


def whole(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
    return small


def heat_of(found: ActivationMap, size: tuple[int, int]) -> str | None:
    """Encode what to lay over a picture of this size, in pixels, whose center is the photo's."""
    if found.grid is None:
        return None
    scale = HEAT_SIZE / max(size)
    width, height = (max(1, round(side * scale)) for side in size)
    darkness = Image.new("L", (width, height), round(255 * DARKEST))
    seen = max(1, round(found.side * min(width, height)))
    shares = DARKEST * (1 - np.array(found.grid) ** CONTRAST)
    places = Image.fromarray((255 * shares).astype(np.uint8))
    places = places.resize((seen, seen), Image.Resampling.BICUBIC)
    darkness.paste(places, ((width - seen) // 2, (height - seen) // 2))
    return data_uri(Image.merge("LA", (Image.new("L", darkness.size), darkness)), "PNG")


def data_uri(image: Image.Image, kind: str, **options: int) -> str:
    """Encode a picture so that a page can hold it."""
    image.save(buffer := io.BytesIO(), kind, optimize=True, **options)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{kind.lower()};base64,{data}"
