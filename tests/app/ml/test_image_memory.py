"""What decoding a picture takes, in a process of its own: no more than the limits count on."""

import contextlib
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tests.support.pictures import (
    PNG_MAGIC,
    encoded,
    flat_jpeg,
    photo_like,
    png,
    png_chunk,
)

from app.ml.images import SERVING_LIMITS, ImageTooLargeError, Limits, load_image

BACKEND = Path(__file__).resolve().parents[3] / "backend"
PROMISE = 300  # MB for a photo, as docs/serving.md says
SLACK = 4  # MB for what the allocator rounds up
# A small picture first: what a decoder loads once is not the photo's.
MEASURE = """
import sys
from pathlib import Path
from app.ml.images import load_image
def field(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
large, small = sys.argv[1:]
load_image(small)
Path("/proc/self/clear_refs").write_text("5")
before = field("VmRSS")
load_image(large)
print(field("VmHWM") - before)
"""

Make = Callable[[tuple[int, int]], bytes]


def drawn(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """A photo's corner all over the picture: large, and quick to make."""
    tile = photo_like(256, 256).convert("RGB" if mode == "I;16" else mode)
    if mode == "I;16":
        tile = tile.convert("I").point(lambda level: level * 257).convert("I;16")
    if mode.endswith("A"):  # encoders leave out what is nowhere clear
        tile.putalpha(Image.radial_gradient("L"))
    image = Image.new(mode, size)
    for x in range(0, size[0], 256):
        image.paste(tile, (x, 0))
    row = image.crop((0, 0, size[0], 256))
    for y in range(256, size[1], 256):
        image.paste(row, (0, y))
    return image


def saved(form: str, mode: str = "RGB", **options: object) -> Make:
    return lambda size: encoded(drawn(size, mode), form, **options)


def interlaced(size: tuple[int, int]) -> bytes:
    """A PNG of zeros in the seven passes of Adam7 (PNG specification, section 8.2)."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)]
    stream = zlib.compressobj(1)
    parts = []
    for left, top, across, down in [*passes, (0, 1, 1, 2)]:
        row = bytes(1 + 3 * -(-(size[0] - left) // across))
        parts += [stream.compress(row) for _ in range(-(-(size[1] - top) // down))]
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 1))
    pixels = png_chunk(b"IDAT", b"".join([*parts, stream.flush()]))
    return b"".join([PNG_MAGIC, header, pixels, png_chunk(b"IEND")])


# How a picture is made, and the width and height of one that is nearly as large as may be.
PICTURES: dict[str, tuple[Make, tuple[int, int]]] = {
    "JPEG": (lambda size: flat_jpeg(size), (14_000, 14_000)),
    "CMYK JPEG": (lambda size: flat_jpeg(size, components=4), (12_000, 12_000)),
    "small JPEG": (saved("JPEG"), (510, 10_000)),
    "progressive JPEG": (saved("JPEG", progressive=True), (8500, 8500)),
    "progressive CMYK JPEG": (saved("JPEG", "CMYK", progressive=True), (4850, 4850)),
    "progressive gray JPEG": (saved("JPEG", "L", progressive=True), (9700, 9700)),
    "JPEG of a scan per component": (lambda size: flat_jpeg(size, together=False), (6900, 6900)),
    "PNG": (saved("PNG", compress_level=1), (6000, 6000)),
    "PNG with alpha": (saved("PNG", "RGBA", compress_level=1), (6000, 6000)),
    "PNG of 16 bits": (lambda size: png(size, 16, 2), (6050, 6050)),
    "gray PNG of 16 bits": (saved("PNG", "I;16", compress_level=1), (5900, 5900)),
    "gray PNG with alpha": (saved("PNG", "LA", compress_level=1), (4900, 4900)),
    "PNG with a palette": (saved("PNG", "P", compress_level=1), (6000, 6000)),
    "PNG with a clear palette entry": (
        saved("PNG", "P", compress_level=1, transparency=3),
        (4950, 4950),
    ),
    "PNG with a clear color": (
        lambda size: png(size, 8, 2, png_chunk(b"tRNS", bytes(6))),
        (4280, 4280),
    ),
    "interlaced PNG": (interlaced, (6050, 6050)),
    "WebP": (saved("WEBP", method=0), (4200, 4200)),
    "WebP with alpha": (saved("WEBP", "RGBA", method=0), (3900, 3900)),
    "lossless WebP": (saved("WEBP", lossless=True, quality=0, method=0), (3900, 3900)),
    "AVIF": (saved("AVIF", speed=10), (4700, 4700)),
    "AVIF with all colors": (saved("AVIF", speed=10, subsampling="4:4:4"), (4200, 4200)),
    "AVIF with alpha": (saved("AVIF", "RGBA", speed=10), (4700, 4700)),
    "GIF": (saved("GIF", "P"), (4900, 4900)),
    "HEIC": (saved("HEIF"), (2400, 1800)),
}
NEARLY = Limits(int(0.85 * SERVING_LIMITS.memory), int(0.85 * SERVING_LIMITS.work))
SMALLER = {"small JPEG", "HEIC"}  # there is no larger one; encoding it takes minutes


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", PICTURES)
def test_the_largest_picture_takes_what_is_promised(name: str, tmp_path: Path) -> None:
    make, size = PICTURES[name]
    data = make(size)
    with contextlib.nullcontext() if name in SMALLER else pytest.raises(ImageTooLargeError):
        load_image(data, NEARLY)
    (tmp_path / "large").write_bytes(data)
    (tmp_path / "small").write_bytes(make((96, 64)))
    taken, allowed = growth(tmp_path / "large", tmp_path / "small"), PROMISE
    print(f"{name}: {size[0]}x{size[1]} took {taken:.0f} MB")  # noqa: T201
    if name == "HEIC":
        with pytest.raises(ImageTooLargeError) as raised:
            load_image(data, Limits(memory=1, work=1))
        counted = re.search(r"takes (\d+) MB", str(raised.value))
        assert counted
        allowed = int(counted[1]) + SLACK
    assert taken < allowed


def growth(large: Path, small: Path) -> float:
    """The MB that a fresh process grows by at its peak when it opens the large picture."""
    command = [sys.executable, "-c", MEASURE, str(large), str(small)]
    result = subprocess.run(
        command, cwd=BACKEND, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return float(result.stdout)
