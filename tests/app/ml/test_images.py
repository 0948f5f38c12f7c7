"""Photos as people upload them: what they may cost, how they stand, which colors they mean."""

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from app.ml.preprocessing import (
    ImageError,
    ImageTooLargeError,
    UnreadableImageError,
    UnsupportedImageError,
    load_image,
)

pillow_heif = pytest.importorskip("pillow_heif")
SECOND = 5  # what an attack may take on a busy machine; it took 10 to 50


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def with_exif(orientation: int, *tags: tuple[int, int, int, bytes]) -> bytes:
    """A JPEG of 80x40 whose EXIF holds more tags: (tag, type, count, four bytes)."""
    entries = [(0x0112, 3, 1, struct.pack("<HH", orientation, 0)), *tags]
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4)
    data = encoded(Image.new("RGB", (80, 40), "red"))
    return data[:2] + segment(0xE1, exif) + data[2:]


# How it stands --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag",
    [
        (0x0100, 4, 1, struct.pack("<I", 70_000)),
        (0x0103, 3, 1, struct.pack("<I", 70_000)),
        (0x0103, 2, 4, b"text"),
        (0x011A, 2, 4, b"text"),
        (0x9999, 200, 1, b"\xff\xff\xff\xff"),
        (0x927C, 7, 0xFFFFFFFF, b"\xff\xff\xff\xff"),
    ],
)
def test_no_other_tag_matters_for_how_a_photo_stands(tag: tuple[int, int, int, bytes]) -> None:
    assert load_image(with_exif(6, tag)).size == (40, 80)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_stands_upright(orientation: int) -> None:
    picture = noise(80, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = load_image(encoded(picture, "PNG", exif=exif))
    assert turned.size == ((40, 80) if orientation > 4 else (80, 40))


# What it costs --------------------------------------------------------------------------------


def exif_bomb(size: int) -> bytes:
    """A PNG with one huge tag beside its orientation."""
    tags = struct.pack("<HHHIIHHII", 2, 0x0112, 3, 1, 6, 0x9999, 2, size, 38)
    payload = b"II*\0\x08\0\0\0" + tags + bytes(4) + b"x" * size
    data = encoded(Image.new("RGB", (80, 40)), "PNG")
    chunk = b"eXIf" + payload
    chunk = struct.pack(">I", len(payload)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data[:33] + chunk + data[33:]


def scan_bomb(scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encoded(Image.new("RGB", (2000, 2000)), progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * scans + b"\xff\xd9"


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(lambda: exif_bomb(1_000_000), id="1 MB of EXIF"),
        pytest.param(lambda: exif_bomb(19_000_000), id="19 MB of EXIF"),
        pytest.param(lambda: scan_bomb(200), id="200 scans"),
        pytest.param(lambda: scan_bomb(5000), id="5000 scans"),
        pytest.param(
            lambda: b"\xff\xd8" + segment(0xE5, bytes(60_000)) * 300, id="a flood of segments"
        ),
        pytest.param(lambda: b"\xff\xd8" + b"\xff" * 5_000_000, id="fill bytes"),
    ],
)
def test_a_picture_that_costs_too_much_is_refused_or_cheap(bomb: object) -> None:
    data = bomb()  # type: ignore[operator]
    began = time.perf_counter()
    try:
        load_image(data)
    except ImageError as error:
        assert "\n" not in str(error)
    assert time.perf_counter() - began < SECOND


@pytest.mark.parametrize("pixels", [(9248, 6936), (12000, 9000)])
def test_photos_of_todays_phones_pass(pixels: tuple[int, int]) -> None:
    """64 and 108 megapixels."""
    assert min(load_image(encoded(Image.new("RGB", pixels), quality=50)).size) >= 512


def test_a_screenshot_of_a_5k_screen_passes() -> None:
    assert load_image(encoded(Image.new("RGB", (5120, 2880)), "PNG")).size == (5120, 2880)


def test_the_message_has_the_exact_numbers() -> None:
    with pytest.raises(ImageTooLargeError, match=r"20000x20000 \(400\.00 megapixels\)"):
        load_image(encoded(Image.new("L", (20_000, 20_000)), "PNG"))


# Damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_a_file_whose_second_half_is_zeros_is_damaged(format: str) -> None:
    """As a full disk or a broken sync leaves it."""
    data = encoded(noise(300, 200), format)
    half = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    with pytest.raises(ImageError):
        load_image(half)


def test_a_jpeg_that_was_cut_and_closed_is_damaged() -> None:
    data = encoded(noise(300, 200))
    with pytest.raises(UnreadableImageError, match="damaged"):
        load_image(data[: len(data) // 2] + b"\xff\xd9")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "AVIF"])
@pytest.mark.parametrize("color", ["black", "white", "gray", (127, 127, 127), "red"])
def test_flat_pictures_and_flat_bottoms_are_whole(format: str, color: object) -> None:
    flat = Image.new("RGB", (120, 90), color)  # type: ignore[arg-type]
    assert load_image(encoded(flat, format)).size == (120, 90)
    flat.paste(noise(120, 40), (0, 0))
    assert load_image(encoded(flat, format)).size == (120, 90)


def test_no_real_photo_counts_as_damaged(shared_dir: Path) -> None:
    paths = sorted((shared_dir / "data" / "food-101" / "images").glob("*/*.jpg"))[::10]
    assert paths and all(load_image(path).size for path in paths)


@pytest.mark.parametrize(
    "head", [b"RIFF\0\0\0\0WEBPVP8 ", b"\0\0\0\x1cftypavif\0\0\0\0", b"\0\0\0\x18ftypheic\0\0\0\0"]
)
def test_a_known_format_that_is_cut_off_is_unreadable(head: bytes) -> None:
    with pytest.raises(UnreadableImageError):
        load_image(head)


# HEIC -----------------------------------------------------------------------------------------


def heic(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, **options)
    return buffer.getvalue()


def test_an_iphones_photo_is_read_upright() -> None:
    picture = Image.new("RGB", (256, 128), "red")
    picture.paste("blue", (0, 0, 128, 128))
    exif = Image.Exif()
    exif[0x0112] = 6
    loaded = load_image(heic(picture, exif=exif.tobytes(), quality=90))
    assert loaded.size == (128, 256)  # turned once
    red, _, blue = loaded.getpixel((64, 20))  # type: ignore[misc]
    assert blue > 200 > 60 > red


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(noise(64, 64))
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(UnsupportedImageError, match="pip install pillow-heif"):
        load_image(data)


# Color ----------------------------------------------------------------------------------------


def swapped_srgb() -> bytes:
    """An sRGB profile whose red and blue primaries are exchanged."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return data.replace(b"rXYZ", b"tmp!").replace(b"bXYZ", b"rXYZ").replace(b"tmp!", b"bXYZ")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_color_profile_is_converted_to_srgb(format: str) -> None:
    red = Image.new("RGB", (40, 40), (200, 20, 20))
    meant = load_image(encoded(red, format, icc_profile=swapped_srgb())).getpixel((20, 20))
    assert np.allclose(meant, (20, 20, 200), atol=6)


def test_a_profile_that_means_srgb_changes_no_pixel() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain, tagged = (load_image(encoded(noise(40, 40), "PNG", icc_profile=p)) for p in (None, srgb))
    assert np.array_equal(np.asarray(plain), np.asarray(tagged))


@pytest.mark.parametrize("profile", [b"", b"not a profile", bytes(5000)])
def test_a_broken_profile_is_ignored(profile: bytes) -> None:
    picture = noise(40, 40)
    loaded = load_image(encoded(picture, "PNG", icc_profile=profile))
    assert np.array_equal(np.asarray(loaded), np.asarray(picture))
