"""The cache of small copies: never seen in the pixels, never in the way."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app.ml.preprocessing import (
    IMAGE_EXTENSIONS,
    ImageTooLargeError,
    PreprocessConfig,
    UnreadableImageError,
    UnsupportedImageError,
    load_image,
)
from training.data import cache as image_cache
from training.data.cache import ImageCache
from training.data.loader import EvalImages, SampleKey


def write_photo(path: Path, width: int = 40, height: int = 30, seed: int = 0) -> str:
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(array).save(path, quality=95)
    return str(path)


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    width=st.integers(1, 600),
    height=st.integers(1, 600),
    mode=st.sampled_from(["RGB", "L", "RGBA"]),
)
def test_a_hit_a_miss_and_no_cache_give_the_same_pixels(
    width: int, height: int, mode: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if max(width, height) > 20 * min(width, height):
        width = height
    folder = tmp_path_factory.mktemp("cache")
    photo = folder / "photo.png"
    Image.linear_gradient("L").resize((width, height)).convert(mode).save(photo)
    cache = ImageCache(folder / "cache")
    miss, hit = cache.load(str(photo)), cache.load(str(photo))
    assert len(entries(folder / "cache")) == 1
    assert torch.equal(miss, hit)
    assert torch.equal(miss, ImageCache(None).load(str(photo)))
    assert miss.dtype == torch.uint8
    short = min(width, height, 256)
    assert min(miss.shape[1:]) == short
    assert miss.shape[2] / miss.shape[1] == pytest.approx(width / height, rel=0.51 / short)


def test_the_copy_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "photo.jpg", exif=exif)
    for _ in range(2):
        assert ImageCache(tmp_path / "cache").load(str(tmp_path / "photo.jpg")).shape == (3, 40, 20)


def test_a_hit_does_not_open_the_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = write_photo(tmp_path / "photo.jpg")
    cache = ImageCache(tmp_path / "cache")
    expected = cache.load(photo)
    monkeypatch.setattr(image_cache, "load_image", None)
    assert torch.equal(cache.load(photo), expected)


@settings(max_examples=100, deadline=None)
@given(
    place=st.integers(0, 10**6),
    harm=st.sampled_from(["flip", "cut", "empty", "zeros", "four zeros"]),
)
def test_a_damaged_entry_is_made_anew(
    place: int, harm: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    photo, cache = write_photo(folder / "photo.jpg"), ImageCache(folder / "cache")
    expected = cache.load(photo)
    (entry,) = entries(folder / "cache")
    whole = bytearray(entry.read_bytes())
    place %= len(whole)
    damaged = whole.copy()
    damaged[place] ^= 255
    replaced = {"flip": damaged, "cut": whole[:place], "zeros": bytes(len(whole))}
    entry.write_bytes(replaced.get(harm, b"" if harm == "empty" else bytes(4)))
    assert torch.equal(cache.load(photo), expected)
    assert entry.read_bytes() == whole
    assert entries(folder / "cache") == [entry]


def test_a_changed_photo_is_another_entry(tmp_path: Path) -> None:
    photo, cache = tmp_path / "photo.jpg", ImageCache(tmp_path / "cache")
    contents = [Path(write_photo(photo, seed=seed)).read_bytes().ljust(9000) for seed in (0, 1)]
    photo.write_bytes(contents[0])
    first = cache.load(str(photo))
    photo.write_bytes(contents[1])  # of the same size
    os.utime(photo, ns=(1, 1))
    second = cache.load(photo)
    assert not torch.equal(first, second)
    assert torch.equal(second, ImageCache(None).load(str(photo)))
    assert len(entries(tmp_path / "cache")) == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows does not tell of such a change")
def test_a_photo_replaced_by_one_of_the_same_size_and_time_is_another_entry(
    tmp_path: Path,
) -> None:
    """As copies that keep their times do, and clocks that are set back."""
    cache, photo = ImageCache(tmp_path / "cache"), tmp_path / "photo.jpg"
    seen = []
    for seed in (0, 1):
        other = Path(write_photo(tmp_path / f"{seed}.jpg", seed=seed))
        other.write_bytes(other.read_bytes().ljust(9000))
        os.utime(other, ns=(5, 5))
        shutil.copy2(other, photo)
        assert (photo.stat().st_size, photo.stat().st_mtime_ns) == (9000, 5)
        seen.append(cache.load(str(photo)))
    assert not torch.equal(*seen)
    assert torch.equal(seen[1], ImageCache(None).load(str(photo)))


def test_an_entry_is_not_called_a_jpeg(tmp_path: Path) -> None:
    """Its last bytes are a checksum: what looks for photos must not find it."""
    ImageCache(tmp_path / "cache").load(write_photo(tmp_path / "photo.jpg"))
    (entry,) = entries(tmp_path / "cache")
    assert entry.name.endswith(".jpg+crc") and entry.suffix not in IMAGE_EXTENSIONS


def test_where_nothing_can_be_added_what_is_there_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (write_photo(tmp_path / f"{seed}.jpg", seed=seed) for seed in range(2))
    expected = ImageCache(tmp_path / "cache").load(old)
    cache = ImageCache(no_room(tmp_path, monkeypatch))
    cache.load(new)
    monkeypatch.setattr(image_cache, "load_image", None)
    assert torch.equal(cache.load(old), expected)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such a name")
def test_a_picture_that_is_too_large_for_the_server_may_be_trained_on(tmp_path: Path) -> None:
    photo = tmp_path / "screen.png"
    Image.new("L", (12_000, 9_000)).save(photo)
    with pytest.raises(ImageTooLargeError):
        load_image(photo)
    assert ImageCache(None).load(str(photo)).shape == (3, 256, 341)
    config = PreprocessConfig(36, 32, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert EvalImages((str(photo),), config)[SampleKey(0, 0, 0)].problem is None


def test_copies_are_larger_for_larger_crops_and_kept_apart(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (900, 700)).save(photo)
    sides = {96: 256, 224: 256, 260: 256, 288: 329, 384: 438, 600: 512}
    for crop, side in sides.items():
        assert min(ImageCache(tmp_path / "cache", crop).load(str(photo)).shape[1:]) == side
    assert len(entries(tmp_path / "cache")) == len(set(sides.values()))


def test_a_photo_whose_name_is_not_text(tmp_path: Path) -> None:
    photo = write_photo(tmp_path / os.fsdecode(b"caf\xe9.jpg"))
    cache = ImageCache(tmp_path / "cache")
    assert torch.equal(cache.load(photo), cache.load(photo))
    assert len(entries(tmp_path / "cache")) == 1


def test_photos_of_the_same_name_are_kept_apart(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path / "cache")
    photos = []
    for seed, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        photos.append(write_photo(tmp_path / name / "1.jpg", seed=seed))
        os.utime(photos[-1], ns=(5, 5))
    assert not torch.equal(cache.load(photos[0]), cache.load(photos[1]))


def no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(
        image_cache.shutil,
        "disk_usage",
        lambda _: SimpleNamespace(free=image_cache.RESERVED_BYTES - 1),
    )
    return folder / "cache"


def not_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: ARG001
    (folder / "cache").write_text("a file")
    return folder / "cache"


def no_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    return folder / "cache"


def fails_to_rename(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_cache.os, "replace", refuse)
    return folder / "cache"


@pytest.mark.parametrize("obstacle", [no_room, not_a_folder, no_permission, fails_to_rename])
def test_where_nothing_can_be_kept_it_says_so_once_and_goes_on(
    obstacle: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    photos = [write_photo(tmp_path / f"{seed}.jpg", seed=seed) for seed in range(3)]
    expected = [ImageCache(None).load(photo) for photo in photos]
    assert callable(obstacle)
    cache = ImageCache(folder := obstacle(tmp_path, monkeypatch))
    assert all(torch.equal(cache.load(p), e) for p, e in zip(photos, expected, strict=True))
    (message,) = caplog.messages
    assert str(folder) in message and "continuing, slower" in message
    assert not folder.is_dir() or entries(folder) == []


def test_what_was_kept_may_be_deleted_at_any_time(tmp_path: Path) -> None:
    photo, cache = write_photo(tmp_path / "photo.jpg"), ImageCache(tmp_path / "cache")
    expected = cache.load(photo)
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(cache.load(photo), expected)
    assert len(entries(tmp_path / "cache")) == 1


@pytest.mark.parametrize("folder", [None, "cache"])
def test_an_unreadable_photo_is_an_error_and_no_entry(folder: str | None, tmp_path: Path) -> None:
    cache = ImageCache(tmp_path / folder if folder else None)
    (tmp_path / "text.jpg").write_text("not a photo")
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(UnsupportedImageError):
        cache.load(str(tmp_path / "text.jpg"))
    with pytest.raises(UnreadableImageError):
        cache.load(str(tmp_path / "empty.jpg"))
    with pytest.raises(FileNotFoundError):
        cache.load(str(tmp_path / "none.jpg"))
    assert not (tmp_path / "cache").exists()
