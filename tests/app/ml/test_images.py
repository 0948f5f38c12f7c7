"""What is opened, and how: formats, orientation, color, transparency, limits, damage."""

import base64
import gzip
import io
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tests.support.pictures import (
    SRGB,
    Tag,
    app1,
    claiming,
    cmyk_profile,
    encoded,
    exif,
    flat_jpeg,
    gray_profile,
    jpeg_with,
    noise,
    orientation_tag,
    photo_like,
    plate,
    png,
    png_chunk,
    png_with,
    rgb_profile,
    scan_bomb,
)

from app.ml.preprocessing import (
    DRAFT_SIDE,
    IMAGE_EXTENSIONS,
    SERVING_LIMITS,
    TRAINING_LIMITS,
    ImageTooLargeError,
    Limits,
    UnreadableImageError,
    UnsupportedImageError,
    load_image,
)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "HEIF")


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def distance(image: Image.Image, other: Image.Image) -> float:
    """The mean difference of their pixels, in levels of 255."""
    return float(np.abs(np.asarray(image, float) - np.asarray(other, float)).mean())


# Formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGB", "PNG"), ("RGBA", "PNG"),
        ("I;16", "PNG"), ("L", "JPEG"), ("RGB", "JPEG"), ("CMYK", "JPEG"), ("YCbCr", "JPEG"),
        ("RGB", "WEBP"), ("RGBA", "WEBP"), ("P", "GIF"), ("RGB", "AVIF"), ("RGB", "MPO"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_image", [False, True])
def test_every_mode_becomes_rgb_of_the_same_size(mode: str, format: str, as_image: bool) -> None:
    source = Image.new(mode, (31, 17))
    data = encoded(source, format)
    image = load_image(Image.open(io.BytesIO(data)) if as_image else data)
    assert (image.mode, image.size) == ("RGB", (31, 17))


@pytest.mark.parametrize("mode", ["HSV", "LAB", "I", "F", "RGBX", "PA", "CMYK"])
def test_images_from_memory_may_have_any_mode(mode: str) -> None:
    image = load_image(Image.new(mode, (31, 17)))
    assert (image.mode, image.size) == ("RGB", (31, 17))


def test_an_image_from_memory_stays_as_it_was() -> None:
    source = noise(8, 8)
    source.info["icc_profile"] = rgb_profile()
    before = source.tobytes()
    image = load_image(source)
    image.paste("black", (0, 0, 8, 8))
    assert source.tobytes() == before and source.info["icc_profile"] == rgb_profile()


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "AVIF", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_pixels_are_those_that_pillow_decodes(format: str, mode: str) -> None:
    if format == "JPEG" and mode in ("P", "RGBA"):
        pytest.skip("JPEG has neither")
    data = encoded(photo_like(200, 150).convert(mode), format)
    assert load_image(data).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_is_what_it_holds_whatever_it_is_called(format: str, tmp_path: Path) -> None:
    data = encoded(plate(), format)
    for ending in (".jpg", ".heic", ""):
        path = tmp_path / f"photo{ending}"
        path.write_bytes(data)
        assert load_image(path).tobytes() == load_image(data).tobytes()


def test_endings_of_all_formats_are_known() -> None:
    assert {".jfif", ".pjpeg", ".pjp", ".jpe", ".mpo", ".apng", ".heic", ".heif", ".hif"} <= set(
        IMAGE_EXTENSIONS
    )
    assert all(ending.startswith(".") and ending.islower() for ending in IMAGE_EXTENSIONS)


def test_16_bit_gray_is_scaled_and_not_clipped_to_white() -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = load_image(encoded(Image.fromarray(values)))
    assert [pixel(image, x)[0] for x in range(4)] == [0, 1, 128, 255]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "AVIF", "PNG"])
def test_an_animation_gives_its_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=9)
    assert distance(load_image(data), frames[0]) < 3


def test_the_first_frame_of_a_gif_may_be_larger_than_its_screen() -> None:
    data = bytearray(encoded(plate(), "GIF"))
    data[6:10] = struct.pack("<HH", 10, 10)
    assert load_image(bytes(data)).size == (96, 64)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_large_picture_comes_small_and_looks_the_same(format: str) -> None:
    large = Image.linear_gradient("L").resize((2000, 2400)).convert("RGB")
    image = load_image(encoded(large, format))
    assert image.size == (1000, 1200) and min(image.size) >= DRAFT_SIDE
    assert distance(image, large.resize(image.size)) < 2


# HEIC -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_large_heic_comes_at_the_size_of_such_a_jpeg() -> None:
    large = Image.linear_gradient("L").resize((2001, 2400)).convert("RGB")
    image = load_image(encoded(large, "HEIF"))
    assert image.size == load_image(encoded(large, "JPEG")).size == (1001, 1200)
    assert distance(image, large.resize(image.size)) < 2


def test_heic_may_have_10_bits_or_one_channel_or_transparency() -> None:
    import pillow_heif

    values = np.asarray(plate((64, 48)), dtype=np.uint16) * 257
    buffer = io.BytesIO()
    pillow_heif.from_bytes("RGB;16", (64, 48), values.tobytes()).save(buffer)
    assert distance(load_image(buffer.getvalue()), plate((64, 48))) < 3
    assert distance(load_image(encoded(plate(mode="L"), "HEIF")), plate()) < 3
    clear = plate(mode="RGBA")
    clear.putalpha(0)
    assert distance(load_image(encoded(clear, "HEIF")), Image.new("RGB", clear.size, "white")) < 3


@pytest.mark.parametrize("primary", [0, 1, 2])
def test_of_several_pictures_in_a_heic_the_primary_one_counts(primary: int) -> None:
    import pillow_heif

    burst = pillow_heif.from_pillow(Image.new("RGB", (64, 64), (200, 0, 0)))
    for color in ((0, 200, 0), (0, 0, 200)):
        burst.add_from_pillow(Image.new("RGB", (64, 64), color))
    burst.save(buffer := io.BytesIO(), primary_index=primary)
    assert np.argmax(pixel(load_image(buffer.getvalue()))) == primary


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_photo_packed_as_something_else_is_named(form: str) -> None:
    text = base64.b64encode(encoded(plate(), form))
    url = b"data:image/png;base64," + text
    for data, name in ((text, "base64"), (url, "a data URL"), (gzip.compress(text), "gzip")):
        with pytest.raises(UnsupportedImageError, match=f"not an image but {name};"):
            load_image(data)


def test_a_heic_that_lists_no_picture_is_damaged() -> None:
    data = encoded(plate(), "HEIF")
    with pytest.raises(UnreadableImageError, match="damaged"):
        load_image(data.replace(b"hvcC", b"skip"))


def test_a_heic_without_its_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(plate(), "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UnsupportedImageError, match="pip install pillow-heif") as raised:
        load_image(data)
    assert "\n" not in str(raised.value)


def test_reading_heic_teaches_pillow_nothing() -> None:
    """A registered decoder would be one more that any Image.open tries."""
    data = encoded(plate(), "HEIF")
    load_image(data)
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(io.BytesIO(data))


# Orientation ----------------------------------------------------------------------------------

UPRIGHT = {  # what was done to an upright picture, so that each orientation undoes it
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(image: Image.Image, orientation: int) -> Image.Image:
    turn = UPRIGHT[orientation]
    return image if turn is None else image.transpose(turn)


def with_orientation(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "MPO", "WEBP", "AVIF", "HEIF"])
def test_every_orientation_stands_upright(format: str, orientation: int) -> None:
    """In AVIF and HEIC the container turns, and what its EXIF says does not count."""
    upright = Image.new("RGB", (96, 64), "white")
    upright.paste("red", (0, 0, 32, 32))
    upright.paste("blue", (32, 0, 64, 16))
    stored = turned(upright, orientation)
    data = encoded(stored, format, exif=with_orientation(orientation).tobytes())
    assert distance(load_image(data), upright) < 8


@pytest.mark.parametrize("format", ["AVIF", "HEIF"])
def test_exif_in_a_container_that_turns_is_not_believed(format: str) -> None:
    """Phones leave the orientation in EXIF too, so it would turn twice."""
    orientation = exif([orientation_tag(6, ">")], ">")
    harmless = orientation.replace(b"\x01\x12", b"\x01\x06")
    data = encoded(plate((96, 64)), format, exif=harmless)
    turned_in_exif = data.replace(harmless, orientation)
    assert turned_in_exif != data
    assert load_image(turned_in_exif).tobytes() == load_image(data).tobytes()


@st.composite
def exif_blocks(draw: st.DrawFn) -> tuple[bytes, int]:
    """A directory of whatever tags, one of them the orientation, in either byte order."""
    order = draw(st.sampled_from("<>"))
    orientation = draw(st.integers(0, 9))
    numbers = st.integers(0, 0xFFFF).filter(lambda number: number != 0x0112)
    others: list[Tag] = draw(
        st.lists(
            st.tuples(
                numbers,
                st.integers(0, 20),
                st.one_of(st.integers(0, 9), st.integers(0, 2**32 - 1)),
                st.binary(max_size=40),
            ),
            max_size=8,
        )
    )
    place = draw(st.integers(0, len(others)))
    kind, code = draw(st.sampled_from([(3, "H"), (4, "L")]))
    tag: Tag = (0x0112, kind, 1, struct.pack(order + code, orientation))
    block = exif([*others[:place], tag, *others[place:]], order)
    return block + draw(st.binary(max_size=20)), orientation


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(block=exif_blocks(), format=st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_the_orientation_is_read_whatever_stands_beside_it(
    block: tuple[bytes, int], format: str
) -> None:
    """Other tags may be of wrong types, endless or impossible to write again."""
    data, orientation = block
    stored = noise(12, 20)
    if format == "JPEG":
        file = jpeg_with(app1(data), stored)
    elif format == "PNG":
        plain = encoded(stored)
        file = plain[:33] + png_chunk(b"eXIf", data) + plain[33:]
    else:
        file = encoded(stored, format, lossless=True, exif=data)
    plain_pixels = load_image(
        encoded(stored, format, **({"lossless": True} if format == "WEBP" else {}))
    )
    back = {6: 8, 8: 6}.get(orientation, orientation)
    expected = turned(plain_pixels, back if back in UPRIGHT else 1)
    assert load_image(file).tobytes() == expected.tobytes()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 60))
def test_exif_of_garbage_is_no_orientation(garbage: bytes, kept: int) -> None:
    plain = load_image(encoded(plate(), "JPEG")).tobytes()
    for block in (garbage, exif([orientation_tag(1)])[:kept], b"II*\0" + garbage):
        assert load_image(jpeg_with(app1(block))).tobytes() == plain


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
AS_TEXT = b"\nexif\n      %d\n" % (len(exif([orientation_tag(6)])) + 6)
AS_TEXT += (b"Exif\0\0" + exif([orientation_tag(6)])).hex().encode()


@pytest.mark.parametrize(
    "data",
    [
        jpeg_with(app1(XMP, b"http://ns.adobe.com/xap/1.0/\0")),
        png_with(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
        png_with(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP))),
        png_with(png_chunk(b"tEXt", b"Raw profile type exif\0" + AS_TEXT)),
        png_with(png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(AS_TEXT))),
        encoded(plate(), "WEBP", xmp=XMP),
    ],
)
def test_where_exif_says_nothing_xmp_and_older_ways_do(data: bytes) -> None:
    assert load_image(data).size == (64, 96)


# Color ----------------------------------------------------------------------------------------


def test_colors_are_those_of_the_profile() -> None:
    """(200, 60, 30) in Display P3 is (219, 37, 0) in sRGB; in linear light, (229, 133, 96)."""
    picture = Image.new("RGB", (16, 16), (200, 60, 30))
    p3 = load_image(encoded(picture, icc_profile=rgb_profile()))
    assert pixel(p3) == pytest.approx((219, 37, 0), abs=2)
    linear = load_image(encoded(picture, icc_profile=rgb_profile(SRGB, gamma=1)))
    assert pixel(linear) == pytest.approx((229, 133, 96), abs=2)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "HEIF"])
def test_every_format_carries_a_profile(format: str) -> None:
    picture = Image.new("RGB", (16, 16), (200, 60, 30))
    plain = load_image(encoded(picture, format))
    picture.info["icc_profile"] = rgb_profile()
    data = encoded(picture, format, icc_profile=rgb_profile())
    assert distance(load_image(data), plain) > 10
    opened = load_image(encoded(picture, "PNG", icc_profile=rgb_profile()))
    assert distance(load_image(data), opened) < 8


def test_profiles_of_gray_and_of_inks_count() -> None:
    gray = Image.new("L", (9, 9), 100)
    assert pixel(load_image(encoded(gray, icc_profile=gray_profile(1.0))))[0] == 168  # linear
    cyan = Image.new("CMYK", (9, 9), (255, 0, 0, 0))
    data = encoded(cyan, "JPEG", icc_profile=cmyk_profile(50), quality=95)
    assert pixel(load_image(data)) == pytest.approx((119, 119, 119), abs=3)  # L* 50


def test_transparency_is_laid_on_white_in_the_picture_s_colors() -> None:
    half = Image.new("RGBA", (4, 4), (200, 60, 30, 128))
    over = pixel(load_image(encoded(half, icc_profile=rgb_profile())))
    assert over == pytest.approx([(c + 255) / 2 for c in (219, 37, 0)], abs=3)
    palette = Image.new("RGB", (4, 4), (200, 60, 30)).quantize()
    assert pixel(load_image(encoded(palette, icc_profile=rgb_profile()))) == pytest.approx(
        (219, 37, 0), abs=3
    )


def test_a_profile_in_several_segments_is_put_together() -> None:
    """In any order; and not at all where one is missing."""
    profile = rgb_profile()
    parts = [profile[:100], profile[100:300], profile[300:]]
    segments = [
        app1(part, b"")[:0] + _icc_segment(i + 1, len(parts), part) for i, part in enumerate(parts)
    ]
    picture = Image.new("RGB", (16, 16), (200, 60, 30))
    whole = load_image(encoded(picture, "JPEG", icc_profile=profile)).tobytes()
    plain = load_image(encoded(picture, "JPEG")).tobytes()
    assert load_image(jpeg_with(b"".join(reversed(segments)), picture)).tobytes() == whole
    assert load_image(jpeg_with(segments[0] + segments[2], picture)).tobytes() == plain


def _icc_segment(number: int, count: int, part: bytes) -> bytes:
    payload = b"ICC_PROFILE\0" + bytes([number, count]) + part
    return b"\xff\xe2" + struct.pack(">H", len(payload) + 2) + payload


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "profile",
    [
        b"no profile",
        rgb_profile()[:200],
        rgb_profile() + bytes(5 << 20),  # too long
        gray_profile(1.0)[:100] + bytes(100),
    ],
)
def test_a_broken_or_foreign_profile_changes_nothing(mode: str, profile: bytes) -> None:
    picture = Image.new(mode, (16, 16))
    plain = load_image(encoded(picture, "JPEG")).tobytes()
    assert load_image(encoded(picture, "JPEG", icc_profile=profile)).tobytes() == plain
    others = {"RGB": gray_profile(1.0), "L": cmyk_profile(50), "CMYK": rgb_profile()}
    foreign = encoded(picture, "JPEG", icc_profile=others[mode])
    assert load_image(foreign).tobytes() == plain


@settings(max_examples=150, deadline=None)
@given(
    profile=st.sampled_from([rgb_profile(), gray_profile(2.2), cmyk_profile(50)]),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=8),
    kept=st.floats(0.2, 1),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
)
def test_a_damaged_profile_is_never_fatal(
    profile: bytes, changes: list[tuple[float, int]], kept: float, mode: str
) -> None:
    damaged = bytearray(profile)
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    data = encoded(plate(mode=mode), "JPEG", icc_profile=bytes(damaged[: int(kept * len(damaged))]))
    assert load_image(data).size == (96, 64)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_srgb_with_its_profile_is_what_it_is_without(mode: str) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = noise(64, 64, mode)
    assert (
        load_image(encoded(picture, icc_profile=profile)).tobytes()
        == load_image(encoded(picture)).tobytes()
    )


# Transparency ---------------------------------------------------------------------------------


def test_transparency_is_laid_on_white() -> None:
    clear, red = Image.new("RGBA", (4, 4), (255, 0, 0, 0)), Image.new("RGBA", (4, 4), "red")
    assert pixel(load_image(encoded(clear))) == (255, 255, 255)
    assert pixel(load_image(encoded(red))) == (255, 0, 0)
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert pixel(load_image(encoded(half)))[0] == pytest.approx(127, abs=1)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert pixel(load_image(encoded(palette, transparency=1))) == (255, 255, 255)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_clear_gray_of_a_png_becomes_white_at_every_depth(depth: int) -> None:
    """Two pixels, 0 and 1 in the file's own numbers; 0 is the clear one."""
    bits = "0" * depth + "1".zfill(depth)
    row = b"\0" + int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(
        -(-len(bits) // 8), "big"
    )
    clear = png_chunk(b"tRNS", struct.pack(">H", 0))
    image = load_image(png((2, 1), depth, 0, clear, data=row))
    value = 255 // (2**depth - 1) if depth < 16 else 0
    assert [pixel(image, x)[0] for x in range(2)] == [255, value]


@pytest.mark.parametrize("depth", [8, 16])
def test_the_clear_color_of_a_png_becomes_white_at_every_depth(depth: int) -> None:
    """At 16 bits, colors that differ in the lower bits alone are others."""
    code = ">3B" if depth == 8 else ">3H"
    colors = [(18, 86, 154), (18, 86, 155)]
    if depth == 16:
        colors = [(0x1234, 0x5678, 0x9ABC), (0x1234, 0x5678, 0x9ABD)]
    row = b"\0" + b"".join(struct.pack(code, *color) for color in colors)
    clear = png_chunk(b"tRNS", struct.pack(">3H", *colors[0]))
    image = load_image(png((2, 1), depth, 2, clear, data=row))
    other = colors[1] if depth == 8 else (0x12, 0x56, 0x9A)
    assert [pixel(image, x) for x in range(2)] == [(255, 255, 255), other]


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"", UnreadableImageError, "empty"),
        (b"hello, this is text", UnsupportedImageError, "JPEG, PNG, WEBP, GIF, AVIF, HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", UnsupportedImageError, "supported"),
        (encoded(noise(9, 9), "BMP"), UnsupportedImageError, "supported"),
        (encoded(noise(9, 9), "TIFF"), UnsupportedImageError, "supported"),
        (encoded(noise(9, 9), "ICO"), UnsupportedImageError, "supported"),
        (b"8BPS\0\1" + bytes(60), UnsupportedImageError, "supported"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0isommp42", UnsupportedImageError, "supported"),
        (encoded(noise(90, 90), "JPEG")[:700], UnreadableImageError, "damaged"),
        (encoded(noise(90, 90), "PNG")[:700], UnreadableImageError, "damaged"),
        (encoded(noise(90, 90), "WEBP")[:700], UnreadableImageError, "damaged"),
        (b"\xff\xd8\xff" + b"0" * 50, UnreadableImageError, "cut off or damaged"),
        (encoded(Image.new("RGB", (210, 10))), UnreadableImageError, "210x10.* 20 times"),
        (encoded(Image.new("RGB", (10, 210)), "JPEG"), UnreadableImageError, "10x210.* 20 times"),
        (encoded(Image.new("RGB", (10, 210)), "HEIF"), UnreadableImageError, "10x210.* 20 times"),
    ],
)
def test_unusable_data_is_refused_in_words(data: bytes, error: type, says: str) -> None:
    with pytest.raises(error, match=says) as raised:
        load_image(data)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_cut_off_anywhere_is_damaged_and_not_of_an_unknown_format(format: str) -> None:
    data = encoded(photo_like(64, 48), format)
    known = {"JPEG": 3, "PNG": 4, "GIF": 4}.get(format, 12)
    for kept in [*range(known, 60), *range(60, len(data) * 9 // 10, 97)]:
        with pytest.raises(UnreadableImageError):
            load_image(data[:kept])


def test_the_longest_picture_allowed_is_read() -> None:
    assert load_image(encoded(Image.new("RGB", (200, 10)))).size == (200, 10)


def test_a_path_that_cannot_be_opened_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "no.jpg")
    with pytest.raises(OSError):
        load_image(str(tmp_path))


# Limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (png((9248, 6936), 8, 2, rows=1), r"9248x6936 \(64\.14 megapixels\).* \d{3} MB.* 296 MB"),
        (png((10_000, 10_000), 1, 0, rows=1), "10000x10000"),
        (flat_jpeg((8000, 8000), together=False), "8000x8000"),
        (scan_bomb((5000, 5000), 101), "101 scans"),
        (scan_bomb((5000, 5000), 90), "5000x5000 in 90 scans"),
        (scan_bomb((5000, 5000), 20, refines=True), "5000x5000 in 20 scans"),
        (claiming(encoded(plate((400, 400)), "AVIF"), (400, 400), (9000, 9000)), "9000x9000"),
    ],
)
def test_too_much_to_decode_is_seen_in_the_header(data: bytes, says: str) -> None:
    with pytest.raises(ImageTooLargeError, match=says) as raised:
        load_image(data)
    assert "\n" not in str(raised.value)


def test_a_limit_is_never_refused_with_its_own_number() -> None:
    """ "64 megapixels; the limit is 64" was once said."""
    data = encoded(Image.new("L", (1000, 1000)))
    needed = 8_000_000 + len(data)
    load_image(data, Limits(memory=2**20 * (needed // 2**20 + 1), work=1))
    with pytest.raises(ImageTooLargeError, match="takes 8 MB to decode; the limit is 7 MB"):
        load_image(data, Limits(memory=7 * 2**20, work=1))


def test_training_reads_what_is_too_much_for_a_server() -> None:
    data = flat_jpeg((8000, 8000), together=False)
    assert load_image(data, limits=TRAINING_LIMITS).size == (1000, 1000)
    assert TRAINING_LIMITS.memory > SERVING_LIMITS.memory
    assert TRAINING_LIMITS.work > SERVING_LIMITS.work


def test_an_avif_is_as_large_as_its_data_whatever_its_boxes_say() -> None:
    """2 kB that claim 64x64 took 200 MB, for the data had 10,000x10,000."""
    size = (2000, 2000)
    lying = claiming(encoded(Image.new("RGB", size), "AVIF", speed=10), size, (64, 64))
    with pytest.raises(ImageTooLargeError, match=r"takes \d\d MB"):
        load_image(lying, Limits(memory=40 << 20, work=1))


# Damage that decoders let pass ----------------------------------------------------------------


def half_of(data: bytes, share: float, filled: bytes) -> bytes:
    kept = int(len(data) * share)
    return data[:kept] + filled * (len(data) - kept)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    format=st.sampled_from(["JPEG", "PNG", "WEBP", "lossless WEBP", "AVIF", "GIF"]),
    size=st.tuples(st.integers(120, 300), st.integers(120, 300)),
    share=st.floats(0.3, 0.9),
    seed=st.integers(0, 1000),
)
def test_a_file_that_ends_in_zeros_is_damaged(
    format: str, size: tuple[int, int], share: float, seed: int
) -> None:
    """As a full disk or a broken copy leaves it."""
    options: dict[str, Any] = {"AVIF": {"speed": 10}, "lossless WEBP": {"lossless": True}}.get(
        format, {}
    )
    data = encoded(photo_like(*size, seed), format.removeprefix("lossless "), **options)
    assert load_image(data).size == size
    with pytest.raises(UnreadableImageError, match="damaged"):
        load_image(half_of(data, share, b"\0"))


@settings(max_examples=100, deadline=None)
@given(
    size=st.tuples(st.integers(120, 300), st.integers(120, 300)),
    share=st.floats(0.2, 0.97),
    options=st.sampled_from(
        [{}, {"optimize": True}, {"subsampling": 0}, {"restart_marker_rows": 1}, {"quality": 30}]
    ),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    seed=st.integers(0, 1000),
)
@example((291, 189), 0.92557, {"restart_marker_rows": 1}, "RGB", 496)  # at the end of an interval
@example((230, 300), 0.44684, {"restart_marker_rows": 1}, "CMYK", 854)
@example((163, 145), 0.933983, {"quality": 30}, "RGB", 924)  # a last row of gray in other colors
def test_a_jpeg_cut_and_closed_is_damaged(
    size: tuple[int, int], share: float, options: dict[str, Any], mode: str, seed: int
) -> None:
    data = encoded(photo_like(*size, seed).convert(mode), "JPEG", **options)
    start = data.rindex(b"\xff\xda") + 20
    cut = data[: start + int((len(data) - start) * share)].rstrip(b"\xff")
    with pytest.raises(UnreadableImageError, match="damaged"):
        load_image(cut + b"\xff\xd9")


@settings(max_examples=100, deadline=None)
@given(
    size=st.tuples(st.integers(120, 300), st.integers(120, 300)),
    share=st.floats(0.1, 0.95),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    seed=st.integers(0, 1000),
)
def test_a_progressive_jpeg_cut_and_closed_is_damaged(
    size: tuple[int, int], share: float, mode: str, seed: int
) -> None:
    """Up to its last scan, which adds no more than the last bit of fine detail."""
    data = encoded(photo_like(*size, seed).convert(mode), "JPEG", progressive=True)
    first, last = data.index(b"\xff\xda") + 20, data.rindex(b"\xff\xda")
    cut = data[: first + int((last - first) * share)].rstrip(b"\xff")
    assume(not cut_between_scans(data, len(cut)))
    with pytest.raises(UnreadableImageError, match="damaged"):
        load_image(cut + b"\xff\xd9")


def cut_between_scans(data: bytes, place: int) -> bool:
    """In the header of a scan or near its end, where nothing or next to nothing is missing."""
    return any(data.find(b"\xff" + marker, place, place + 12) >= 0 for marker in (b"\xda", b"\xc4"))


def test_a_jpeg_of_a_scan_per_component_cut_and_closed_is_damaged() -> None:
    data = one_scan_each(photo_like(200, 150))
    assert load_image(data).size == (200, 150)
    last = data.rindex(b"\xff\xda") + 10
    for cut in (data[: len(data) // 3], data[: (last + len(data)) // 2]):
        with pytest.raises(UnreadableImageError, match="damaged"):
            load_image(cut.rstrip(b"\xff") + b"\xff\xd9")


def one_scan_each(image: Image.Image) -> bytes:
    """A baseline JPEG of three gray ones: each component in a scan of its own."""
    parts = [encoded(band, "JPEG") for band in image.convert("YCbCr").split()]
    frame = parts[0].index(b"\xff\xc0")
    scans = [part[part.index(b"\xff\xda") : -2] for part in parts]
    head = bytearray(parts[0][: parts[0].index(b"\xff\xda")])
    numbers = b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    head[frame : frame + 13] = (
        head[frame : frame + 2]
        + struct.pack(">H", 17)
        + bytes(head[frame + 4 : frame + 9])
        + b"\x03"
        + numbers
    )
    named = [scan[:5] + bytes([i]) + scan[6:] for i, scan in enumerate(scans, start=1)]
    return bytes(head) + b"".join(named) + b"\xff\xd9"


def test_a_progressive_jpeg_without_its_last_scans_is_answered_if_none_is_cut() -> None:
    """Some encoders leave the finest detail out."""
    data = encoded(photo_like(200, 150), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xc4")  # the table of the last scan
    assert load_image(data[:last] + b"\xff\xd9").size == (200, 150)


def test_a_hole_in_a_jpeg_is_damage() -> None:
    data = encoded(photo_like(300, 300), "JPEG")
    middle = len(data) // 2
    with pytest.raises(UnreadableImageError, match="damaged"):
        load_image(data[:middle] + bytes(4096) + data[middle + 4096 :])


def test_a_wrong_checksum_alone_is_not_damage() -> None:
    """Some programs never write it right; the pixels have another one of their own."""
    data = bytearray(encoded(plate()))
    end = data.index(b"IEND") - 8
    data[end : end + 4] = b"\0\0\0\0"
    assert load_image(bytes(data)).tobytes() == load_image(encoded(plate())).tobytes()


def test_a_jpeg_without_its_end_is_whole_if_its_pixels_are() -> None:
    data = encoded(photo_like(200, 150), "JPEG")
    whole = load_image(data).tobytes()
    assert load_image(data[:-2] + bytes(500)).tobytes() == whole
    assert load_image(data + bytes(5000)).tobytes() == whole
    assert load_image(data + b"\xff" * 5000 + b"trailer").tobytes() == whole


FLAT: dict[str, Callable[[tuple[int, int], tuple[int, int, int], int], Image.Image]] = {
    "one color": lambda size, color, _: Image.new("RGB", size, color),
    "a flat bottom": lambda size, color, seed: _pasted(
        size, color, photo_like(size[0], size[1] // 3, seed)
    ),
    "a border": lambda size, color, seed: ImageOps.expand(
        photo_like(size[0] // 2, size[1] // 2, seed), 40, color
    ),
    "a gradient": lambda size, _, __: Image.linear_gradient("L").resize(size).convert("RGB"),
    "a plate": lambda size, color, _: Image.composite(
        Image.new("RGB", size, color),
        Image.new("RGB", size, "white"),
        Image.radial_gradient("L").resize(size),
    ),
    "stripes": lambda size, color, _: _pasted(size, color, Image.new("RGB", (size[0], 1), "white")),
}


def _pasted(size: tuple[int, int], color: tuple[int, int, int], top: Image.Image) -> Image.Image:
    image = Image.new("RGB", size, color)
    image.paste(top)
    return image


COLORS = st.sampled_from(
    [(0, 0, 0), (255, 255, 255), (128, 128, 128), (127, 127, 127), (200, 30, 60)]
)
ENCODINGS: list[tuple[str, dict[str, Any]]] = [
    ("JPEG", {}),
    ("JPEG", {"optimize": True}),
    ("JPEG", {"optimize": True, "quality": 20, "restart_marker_blocks": 3}),
    ("JPEG", {"progressive": True}),
    ("JPEG", {"subsampling": 0, "optimize": True}),
    ("PNG", {"compress_level": 0}),
    ("PNG", {}),
    ("WEBP", {"quality": 10}),
    ("WEBP", {"lossless": True, "quality": 0, "method": 0}),
    ("WEBP", {"lossless": True, "quality": 100, "method": 2}),
    ("AVIF", {"speed": 10}),
    ("GIF", {}),
]


@pytest.mark.slow
@example("a border", ENCODINGS[8], (181, 153), (127, 127, 127), 35)  # one filler changed nothing
@example("a border", ENCODINGS[8], (195, 118), (200, 30, 60), 51)
@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(sorted(FLAT)),
    encoding=st.sampled_from(ENCODINGS),
    size=st.tuples(st.integers(40, 500), st.integers(40, 500)),
    color=COLORS,
    seed=st.integers(0, 99),
)
def test_flat_pictures_are_whole(
    kind: str,
    encoding: tuple[str, dict[str, Any]],
    size: tuple[int, int],
    color: tuple[int, int, int],
    seed: int,
) -> None:
    """Screenshots, drawings, borders and empty walls end in one color too."""
    image = FLAT[kind](size, color, seed)
    data = encoded(image, encoding[0], **encoding[1])
    assert load_image(data).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.slow
def test_real_photos_are_whole_and_unchanged(shared_dir: Path) -> None:
    """All of them were tried: none of 3,400 was taken for damaged; here every tenth."""
    photos = sorted((shared_dir / "data").glob("*/**/*.jpg"))[::10]
    photos = [path for path in photos if "odd_images" not in path.parts]
    assert len(photos) > 200
    for path in photos:
        with Image.open(path) as image:
            pixels = load_image(path)
            if "icc_profile" not in image.info and min(image.size) < 2 * DRAFT_SIDE:
                plain = ImageOps.exif_transpose(image).convert("RGB")
                assert pixels.tobytes() == plain.tobytes(), path
