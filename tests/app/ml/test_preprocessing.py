"""From a photo to pixels: what is opened, how, and that serving and validation do the same."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app.ml.model import BACKBONES
from app.ml.predictor import FoodPredictor
from app.ml.preprocessing import (
    DRAFT_SIDE,
    EvalTransform,
    ImageTooLargeError,
    Limits,
    PreprocessConfig,
    UnreadableImageError,
    UnsupportedImageError,
    load_image,
    normalize,
    standardize,
)
from training.data.loader import EvalImages, SampleKey

ORIENTATION = 0x0112  # EXIF tag
CONFIG = PreprocessConfig(256, 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width, channels) if channels > 1 else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


# Opening --------------------------------------------------------------------------------------


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


def test_transparency_is_laid_on_white() -> None:
    clear, red = Image.new("RGBA", (4, 4), (255, 0, 0, 0)), Image.new("RGBA", (4, 4), "red")
    assert pixel(load_image(encoded(clear))) == (255, 255, 255)
    assert pixel(load_image(encoded(red))) == (255, 0, 0)
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert pixel(load_image(encoded(half)))[0] == pytest.approx(127, abs=1)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert pixel(load_image(encoded(palette, transparency=1))) == (255, 255, 255)


def test_16_bit_grey_is_scaled_and_not_clipped_to_white() -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = load_image(encoded(Image.fromarray(values)))
    assert [pixel(image, x)[0] for x in range(4)] == [0, 1, 128, 255]


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixel(load_image(data)) == (255, 0, 0)


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


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_exif_orientation_stands_upright(orientation: int) -> None:
    upright = noise(20, 12)
    turn = UPRIGHT[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    data = encoded(stored, exif=with_orientation(orientation))
    assert load_image(data).tobytes() == upright.tobytes()


def test_a_large_jpeg_is_decoded_small_and_looks_the_same() -> None:
    large = Image.linear_gradient("L").resize((2000, 2400)).convert("RGB")
    image = load_image(encoded(large, "JPEG"))
    assert image.size == (1000, 1200) and min(image.size) >= DRAFT_SIDE
    expected = np.asarray(large.resize(image.size), dtype=float)
    assert np.abs(np.asarray(image, dtype=float) - expected).mean() < 2


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"", UnreadableImageError, "empty"),
        (b"hello, this is text", UnsupportedImageError, "JPEG, PNG, WEBP, GIF, AVIF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", UnsupportedImageError, "supported"),
        (encoded(noise(9, 9), "BMP"), UnsupportedImageError, "supported"),
        (encoded(noise(9, 9), "TIFF"), UnsupportedImageError, "supported"),
        (encoded(noise(90, 90), "JPEG")[:700], UnreadableImageError, "damaged"),
        (encoded(noise(90, 90), "PNG")[:700], UnreadableImageError, "damaged"),
        (encoded(noise(90, 90), "WEBP")[:700], UnreadableImageError, "damaged"),
        (b"\xff\xd8\xff" + b"0" * 50, UnreadableImageError, "cut off or damaged"),
        (encoded(Image.new("RGB", (210, 10))), UnreadableImageError, "210x10.* 20 times"),
        (encoded(Image.new("RGB", (10, 210)), "JPEG"), UnreadableImageError, "10x210.* 20 times"),
    ],
)
def test_unusable_data_is_refused_in_words(data: bytes, error: type, says: str) -> None:
    with pytest.raises(error, match=says) as raised:
        load_image(data)
    assert "\n" not in str(raised.value)


def test_the_longest_picture_allowed_is_read() -> None:
    assert load_image(encoded(Image.new("RGB", (200, 10)))).size == (200, 10)


def test_what_decoding_would_cost_is_seen_in_the_header() -> None:
    """A few bytes can unpack to gigabytes, so no pixel may be decoded to find out."""
    little = Limits(memory=100_000, blocks=10_000)
    for format in ("PNG", "JPEG", "WEBP", "GIF", "AVIF"):
        assert load_image(encoded(Image.new("L", (30, 30)), format), little).size == (30, 30)
        with pytest.raises(ImageTooLargeError, match=r"400x400 \(0\.16 megapixels\)"):
            load_image(encoded(Image.new("RGB", (400, 400)), format), little)


def test_a_path_that_cannot_be_opened_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "no.jpg")
    with pytest.raises(OSError):
        load_image(str(tmp_path))


# The recipe -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_each_backbones_recipe_survives_json(name: str) -> None:
    config = PreprocessConfig(**BACKBONES[name].preprocessing)
    assert PreprocessConfig.from_dict(config.to_dict()) == config
    pixels = EvalTransform(config)(noise(300, 280))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, config.crop, config.crop))


@settings(max_examples=100, deadline=None)
@given(st.sets(st.sampled_from(sorted(CONFIG.to_dict()))), st.sets(st.text(max_size=8)))
def test_a_missing_or_unknown_key_is_named(missing: set[str], unknown: set[str]) -> None:
    unknown -= CONFIG.to_dict().keys()
    values = {k: v for k, v in CONFIG.to_dict().items() if k not in missing}
    values |= dict.fromkeys(unknown, 1)
    if not missing and not unknown:
        assert PreprocessConfig.from_dict(values) == CONFIG
        return
    with pytest.raises(ValueError, match="preprocessing needs exactly") as raised:
        PreprocessConfig.from_dict(values)
    assert all(repr(key) in str(raised.value) for key in missing | unknown)


def test_the_crop_is_the_centre_of_the_resized_picture() -> None:
    """The short side becomes 256, then 16 pixels go on each side of it."""
    picture = np.zeros((512, 1024, 3), dtype=np.uint8)
    picture[:, 512:] = 255  # the edge is in the middle
    pixels = EvalTransform(CONFIG)(Image.fromarray(picture))
    assert pixels.shape == (3, 224, 224)
    assert (pixels[:, :, :110] == 0).all() and (pixels[:, :, 114:] == 255).all()


def test_normalize_is_the_textbook_formula() -> None:
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    before = images.clone()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CONFIG.mean, CONFIG.std))
    torch.testing.assert_close(normalize(images, CONFIG), (images / 255 - mean) / std)
    torch.testing.assert_close(standardize(images / 255, CONFIG), (images / 255 - mean) / std)
    assert torch.equal(images, before)


MODES = [
    *(("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "WEBP"), ("RGBA", "WEBP")),
    *(("RGB", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("L", "PNG")),
]


@st.composite
def photos(draw: st.DrawFn) -> tuple[bytes, str]:
    """A picture as it may be uploaded: any shape, mode, format and orientation."""
    mode, format = draw(st.sampled_from(MODES))
    side = draw(st.integers(1, 300))
    other = draw(st.integers(max(1, side // 8), min(700, side * 8)))
    size = draw(st.permutations([side, other]))
    orientation = draw(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]))
    image = noise(size[0], size[1], mode, seed=draw(st.integers(0, 99)))
    return encoded(image, format, exif=with_orientation(orientation)), format.lower()


CONFIGS = st.builds(
    PreprocessConfig,
    resize=st.sampled_from([48, 232, 256]),
    crop=st.sampled_from([32, 48, 224]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    mean=st.just(CONFIG.mean),
    std=st.just(CONFIG.std),
)


@settings(max_examples=120, deadline=None)
@given(photo=photos(), config=CONFIGS)
def test_property_6_serving_sees_what_validation_saw(
    photo: tuple[bytes, str], config: PreprocessConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data, ending = photo
    path = tmp_path_factory.mktemp("photo") / f"photo.{ending}"
    path.write_bytes(data)
    item = EvalImages((str(path),), config)[SampleKey(0, 0, 0)]
    record: Any = SimpleNamespace(preprocessing=config, classes=["a"])
    network: Any = None  # nothing is asked of it here
    served = FoodPredictor(record, network, centroids=torch.eye(2))
    assert item.pixels is not None and item.problem is None
    assert item.pixels.shape == (3, config.crop, config.crop)
    for source in (data, path, str(path), Image.open(path)):
        assert torch.equal(served.preprocess(source), item.pixels)
