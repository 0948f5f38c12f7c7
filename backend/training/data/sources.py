"""Where images come from: folders of class folders, and Food-101 with its download.

Everything here lists and opens no image. A `Pools` says which images each class has.
"""

import hashlib
import http.client
import logging
import os
import re
import shutil
import socket
import tarfile
import tempfile
import time
import unicodedata
import urllib.error
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from torchvision.datasets import Food101

from app.ml.preprocessing import IMAGE_EXTENSIONS
from training.errors import DataError

log = logging.getLogger(__name__)

# Food-101's archive holds 101,000 JPEGs that hardly compress. 1,300 of them average 52.7 kB, so
# 5.3 GB, and a file system rounds each up to its block (2 kB on average): 5.6 GB unpacked.
ARCHIVE_GB, UNPACKED_GB = 5.0, 5.6
STALLED_AFTER_S = 60  # no byte for so long ends the download; urllib would wait for ever
PART_PREFIX = ".food-101-part-"
PART_IS_STALE_S = 24 * 3600  # what a killed download left goes when no other can be at it
# The network, torchvision's MD5 check, the archive's unpacking and its meta/ files, in this order.
DOWNLOAD_FAILURES = (
    *(OSError, http.client.HTTPException, RuntimeError),
    *(tarfile.TarError, zlib.error, EOFError, ValueError),
)

JUNK = {"thumbs.db", "desktop.ini", "__macosx", "__pycache__", "@eadir", "$recycle.bin"}
WAYS_OUT = (
    "Try again, or go without the download: --sample draws a small set, --data_dir takes a folder "
    "with one sub-folder of photos per class, or unpack food-101.tar.gz by hand so that {} holds "
    "food-101/."
)

Pools = dict[str, list[str]]  # class name -> absolute paths of its images


@dataclass
class Findings:
    """What is worth saying, collected on the way."""

    notes: list[str] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def leave_out(self, path: str, reason: str) -> None:
        self.left_out.append({"path": path, "reason": reason})


@dataclass
class BaseData:
    """The base dataset; val or test is None where it has to be taken out of train."""

    source: str
    train: Pools
    val: Pools | None
    test: Pools | None


def normalise_class_name(name: str) -> str:
    """Turn "Paneer Tikka" or "paneer-tikka" into "paneer_tikka"; "" if nothing is left.

    A name does not begin with what makes a spreadsheet compute it.
    """
    # Unicode 3.13 D145 folds between two normalisations; otherwise a second call changes more.
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())
    return re.sub(r"[\s_\-\u2010-\u2015]+", "_", folded).lstrip("._=+@").rstrip("_")


def listing(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def shuffled(paths: Iterable[str], class_name: str, seed: int) -> list[str]:
    """An order that depends on nothing but seed, class name and file names."""

    def key(path: str) -> tuple[bytes, str]:
        text = f"{seed}/{class_name}/{Path(path).name}"
        return hashlib.sha256(text.encode(errors="surrogateescape")).digest(), path

    return sorted(paths, key=key)


def visible(folder: Path) -> list["os.DirEntry[str]"]:
    """What is in a folder, sorted, without hidden files and the droppings of desktops."""
    with os.scandir(folder) as entries:
        kept = [e for e in entries if e.name[0] != "." and e.name.lower() not in JUNK]
    return sorted(kept, key=lambda entry: entry.name)


def subfolders(folder: Path) -> dict[str, Path]:
    return {entry.name: Path(entry.path) for entry in visible(folder) if entry.is_dir()}


def is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def images_in(folder: Path, findings: Findings) -> list[str]:
    """The image files directly in a folder; the rest is found to be left out."""
    images = []
    for entry in visible(folder):
        if entry.is_dir():
            findings.leave_out(entry.path, "a folder inside a class folder")
        elif not is_image_name(entry.name):
            findings.leave_out(entry.path, "not an image format that is read")
        elif not (entry.is_file() and entry.stat().st_size):
            findings.leave_out(entry.path, "an empty file or a dead link")
        else:
            images.append(entry.path)
    return images


def class_folders(root: Path, findings: Findings) -> dict[str, list[Path]]:
    """Normalised name -> the folders of that class; "" gathers the names that say nothing."""
    folders = defaultdict(list)
    for name, folder in subfolders(root).items():
        if not name.isprintable():  # such a name fits in no JSON, so the model could not be saved
            raise DataError(
                f"{root} has a class folder {name!r}, whose name is not text; rename it."
            )
        folders[normalise_class_name(name)].append(folder)
    for name, same in folders.items():
        if len(same) > 1:
            spelt = ", ".join(folder.name for folder in same)
            findings.notes.append(f"The folders {spelt} in {root} are one class: {name}.")
    return dict(folders)


def load_base(data_dir: Path, findings: Findings) -> BaseData:
    """Decide what data_dir holds, and list it; Food-101 is downloaded where nothing is.

    Raises:
        DataError: nothing usable, or a download that failed. OSError: an unreadable folder.
    """
    if not data_dir.exists():
        return _food101(_download_food101(data_dir), findings)
    _clear_stale_parts(data_dir)
    folders = subfolders(data_dir)
    for layout in filter(None, (folders.get("food-101"), data_dir)):
        if {"meta", "images"} <= subfolders(layout).keys():
            return _food101(layout, findings)
    if "food-101" in folders:
        raise DataError(
            f"{folders['food-101']} is incomplete (it needs meta/ and images/); delete or rename "
            "it, and the next start downloads Food-101 again."
        )
    # A folder with a food-101/ of its own, such as the drawn sample, is no class of this one.
    has_classes = any("food-101" not in subfolders(folder) for folder in folders.values())
    if has_classes or any(is_image_name(entry.name) for entry in visible(data_dir)):
        return _image_folder(data_dir, findings)
    return _food101(_download_food101(data_dir), findings)


def _image_folder(data_dir: Path, findings: Findings) -> BaseData:
    found = subfolders(data_dir)
    parts = {part: found[part] for part in ("train", "val", "test") if part in found}
    if "train" not in parts:
        parts = {"train": data_dir}
    elif unused := sorted(found.keys() - parts.keys()):
        findings.notes.append(f"Not used, beside train/, val/ and test/: {listing(unused)}.")
    pools = {part: _class_images(folder, findings) for part, folder in parts.items()}
    if not pools["train"]:
        raise DataError(
            f"{parts['train']} has no class folder with images in it; --data_dir needs food-101/, "
            "train/ with one folder of images per class, or the class folders themselves."
        )
    for part, folder in parts.items():
        if unknown := sorted(pools[part].keys() - pools["train"].keys()):
            raise DataError(
                f"{folder} has classes without images in {parts['train']}: {listing(unknown)}; "
                "add them there or remove them here."
            )
    source = f"Image folders in {data_dir}"
    return BaseData(source, pools["train"], pools.get("val") or None, pools.get("test") or None)


def _class_images(root: Path, findings: Findings) -> Pools:
    pools: Pools = {}
    for name, folders in class_folders(root, findings).items():
        pools[name] = [image for folder in folders for image in images_in(folder, findings)]
        if not (name and pools[name]):
            spelt = ", ".join(str(folder) for folder in folders)
            findings.notes.append(f"Warning: left out {spelt}: no images in it, or no name.")
            del pools[name]
    return pools


class _Food101At(Food101):
    """Food-101 in a folder of any name; torchvision's own looks for `food-101` only."""

    def _check_exists(self) -> bool:
        self._base_folder = Path(self.root)
        self._meta_folder = self._base_folder / "meta"
        self._images_folder = self._base_folder / "images"
        return super()._check_exists()


def _food101(folder: Path, findings: Findings) -> BaseData:
    """The official parts, without the images that meta/ lists and the disk does not have."""
    train, test = (_food101_part(folder, part) for part in ("train", "test"))
    there = {
        path
        for class_folder in subfolders(folder / "images").values()
        for path in images_in(class_folder, findings)
    }
    known = there | {entry["path"] for entry in findings.left_out}
    for pools in (train, test):
        for name, paths in pools.items():
            for path in paths:
                if path not in known:
                    findings.leave_out(path, f"listed in {folder / 'meta'}, not on disk")
            pools[name] = [path for path in paths if path in there]
    return BaseData(f"Food-101 in {folder}", train, None, test)


def _food101_part(folder: Path, part: str) -> Pools:
    try:
        # With loader=str torchvision hands out each path, with its label, instead of an image.
        if folder.name == "food-101":
            dataset = Food101(folder.parent, part, loader=str)
        else:
            dataset = _Food101At(folder, part, loader=str)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"{folder / 'meta' / part}.json is not a readable Food-101 list ({error}); put the "
            "meta/ folder of Food-101 in its place."
        ) from error
    names = [normalise_class_name(name) for name in dataset.classes]
    pools: Pools = {name: [] for name in names}
    for path, label in (dataset[i] for i in range(len(dataset))):
        pools[names[label]].append(path)
    return pools


def _download_food101(data_dir: Path) -> Path:
    """Fetch Food-101 into data_dir, all of it or nothing; returns its folder."""
    if not data_dir.parent.is_dir():
        raise DataError(
            f"{data_dir} does not exist, nor does the folder above it; check --data_dir, or make "
            "that folder if Food-101 is to be downloaded into it."
        )
    _check_free_space(data_dir)
    log.warning("No images in %s yet: downloading Food-101 (%g GB).", data_dir, ARCHIVE_GB)
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
            error.close()  # it holds the connection that brought it
        if is_new:
            with suppress(OSError):  # never made, or no longer empty
                data_dir.rmdir()
        raise DataError(
            f"Food-101 could not be downloaded into {data_dir}: {_download_problem(error)}. "
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
            f"GB unpacked) and {free:.1f} GB are free. {WAYS_OUT.format(data_dir)}"
        )


def _clear_stale_parts(data_dir: Path) -> None:
    for part in data_dir.glob(PART_PREFIX + "*"):
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - part.stat().st_mtime > PART_IS_STALE_S:
                shutil.rmtree(part)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """urllib, as torchvision calls it, has no timeout of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
