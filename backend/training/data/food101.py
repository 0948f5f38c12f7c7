"""Food-101 (Bossard et al. 2014) as torchvision knows it: its lists, and its download."""

import http.client
import logging
import os
import shutil
import socket
import tarfile
import tempfile
import time
import urllib.error
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchvision.datasets import Food101

from app.ml.class_names import normalize_class_name
from training.data.folders import (
    Audit,
    ImagesByClass,
    list_images,
    list_subfolders,
)
from training.errors import DataError

logger = logging.getLogger(__name__)

# Food-101's archive holds 101,000 JPEGs that hardly compress. 1,300 of them average 52.7 kB, so
# 5.3 GB, and a file system rounds each up to its block (2 kB on average): 5.6 GB unpacked.
ARCHIVE_GB, UNPACKED_GB = 5.0, 5.6
STALLED_AFTER_S = 60  # a download without a byte for so long ends; urllib would wait forever
PART_PREFIX = ".food-101-part-"
PART_IS_STALE_S = 24 * 3600  # a partial download this old belongs to no process that still runs
# The network, torchvision's MD5 check, the archive's unpacking and its meta/ files.
DOWNLOAD_FAILURES = (
    OSError,
    http.client.HTTPException,
    RuntimeError,
    tarfile.TarError,
    zlib.error,
    EOFError,
    ValueError,
)
WAYS_OUT = (
    "try again, or do without the download: --sample draws a small set, --data_dir takes a folder "
    "with one sub-folder of photos per class, or unpack food-101.tar.gz by hand so that {} holds "
    "food-101/"
)


class _Food101At(Food101):
    """Food-101 in a folder of any name; torchvision's own looks for `food-101` only."""

    def _check_exists(self) -> bool:
        self._base_folder = Path(self.root)
        self._meta_folder = self._base_folder / "meta"
        self._images_folder = self._base_folder / "images"
        return super()._check_exists()


def list_food101(folder: Path, audit: Audit) -> tuple[ImagesByClass, ImagesByClass]:
    """List the official train and test split, without the images that the disk does not have."""
    train, test = (_food101_split(folder, split) for split in ("train", "test"))
    there = {
        path
        for class_folder in list_subfolders(folder / "images").values()
        for path in list_images(class_folder, audit)
    }
    known = there | {entry["path"] for entry in audit.skipped}
    for images in (train, test):
        for name, paths in images.items():
            for path in paths:
                if path not in known and os.path.dirname(path) not in known:
                    audit.skip(path, f"listed in {folder / 'meta'}, not on disk")
            images[name] = [path for path in paths if path in there]
    return train, test


def _food101_split(folder: Path, split: str) -> ImagesByClass:
    try:
        # With loader=str torchvision returns each path, with its label, instead of an image.
        if folder.name == "food-101":
            dataset = Food101(folder.parent, split, loader=str)
        else:
            dataset = _Food101At(folder, split, loader=str)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"{folder / 'meta' / split}.json is not a readable Food-101 list ({error}); put the "
            "meta/ folder of Food-101 in its place"
        ) from error
    names = [normalize_class_name(name) for name in dataset.classes]
    images: ImagesByClass = {name: [] for name in names}
    for path, label in (dataset[i] for i in range(len(dataset))):
        images[names[label]].append(path)
    return images


def download_food101(data_dir: Path) -> Path:
    """Fetch Food-101 into data_dir, all of it or nothing; return its folder."""
    if not data_dir.parent.is_dir():
        raise DataError(
            f"{data_dir} does not exist, nor does the folder above it; check --data_dir, or make "
            "that folder if Food-101 is to be downloaded into it"
        )
    _check_free_space(data_dir)
    logger.info("no images in %s: downloading Food-101 (%g GB)", data_dir, ARCHIVE_GB)
    is_new = not data_dir.exists()
    try:
        data_dir.mkdir(exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=PART_PREFIX, dir=data_dir) as part,
            _socket_timeout(STALLED_AFTER_S),
        ):
            Food101(part, download=True)
            return Path(part, "food-101").rename(data_dir / "food-101")
    except DOWNLOAD_FAILURES as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        if is_new:
            with suppress(OSError):  # never created, or no longer empty
                data_dir.rmdir()
        raise DataError(
            f"Food-101 could not be downloaded into {data_dir}: {_download_problem(error)}; "
            + WAYS_OUT.format(data_dir)
        ) from error


def _download_problem(error: Exception) -> str:
    if "corrupted" in str(error):  # torchvision's RuntimeError after its MD5 check
        return "the archive arrived incomplete or damaged (wrong MD5)"
    return str(error) or type(error).__name__


def _check_free_space(data_dir: Path) -> None:
    place = data_dir if data_dir.exists() else data_dir.parent
    needed, free = ARCHIVE_GB + UNPACKED_GB, shutil.disk_usage(place).free / 1e9
    if free < needed:
        raise DataError(
            f"Food-101 needs {needed:.1f} GB in {data_dir} ({ARCHIVE_GB} GB archive, {UNPACKED_GB} "
            f"GB unpacked) and {free:.1f} GB are free; {WAYS_OUT.format(data_dir)}"
        )


def clear_stale_parts(data_dir: Path) -> None:
    for part in data_dir.glob(PART_PREFIX + "*"):
        with suppress(OSError):  # another process got there first, or the disk is read-only
            if time.time() - part.stat().st_mtime > PART_IS_STALE_S:
                shutil.rmtree(part)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Give urllib, as torchvision calls it, a timeout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
