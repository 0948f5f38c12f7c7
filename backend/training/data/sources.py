"""Where images come from: Food-101 with its download, folders of classes, and custom classes.

A data set is one reader in `READERS`: given a folder, it lists the images of each split and class,
or returns None where the folder holds something else.
"""

import logging
import os
import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from app.ml.class_names import MIN_NEW_CLASS_IMAGES, normalize_class_name
from app.ml.machine import num_cores
from app.ml.preprocessing import TRAINING_LIMITS, ImageError, load_image
from training.data.folders import (
    Audit,
    ImagesByClass,
    class_folders,
    images_by_class,
    is_archive,
    is_folder,
    is_image,
    is_unread_picture,
    join_names,
    list_folder,
    list_images,
    list_subfolders,
    os_reason,
    skip_by_ending,
)
from training.data.food101 import clear_stale_parts, download_food101, list_food101
from training.errors import DataError

logger = logging.getLogger(__name__)

# What people call the splits, the usual name first.
SPLIT_NAMES = {
    "train": ("train", "training", "train_set", "training_set", "trainset"),
    "val": ("val", "valid", "validation", "dev", "val_set", "validation_set", "valset"),
    "test": ("test", "testing", "evaluation", "eval", "test_set", "testset"),
}
ALL_SPLIT_NAMES = {name for names in SPLIT_NAMES.values() for name in names}
MAX_DEPTH = 3  # folders between the one that is given and the one with the classes
# Folders of years, days and cameras: "Photos from 2023", "2023-05-01", "100APPLE".
NOT_A_DISH = re.compile(r"(.*_)?(19|20)\d\d(_\d\d?){0,2}|\d{3}[a-z_]{5}", re.ASCII)
SAMPLE_NAME = "sample"  # a folder of drawn plates is never taken for real data

# Above this share of unreadable files, custom data is refused; below, they are named and skipped.
MAX_UNREADABLE = 0.05
PROGRESS_EVERY = 5000  # custom images between two lines of progress


@dataclass
class Source:
    """A data set as it was found; val or test is None where it must be taken from train."""

    name: str
    train: ImagesByClass
    val: ImagesByClass | None = None
    test: ImagesByClass | None = None


def load_source(data_dir: Path, audit: Audit) -> Source:
    """List what data_dir holds; download Food-101 into it where it holds nothing.

    Raises:
        DataError: nothing usable, or a download that failed. OSError: the folder cannot be read.
    """
    if not _exists(data_dir):
        return _food101(download_food101(data_dir), audit)
    clear_stale_parts(data_dir)
    seen = Audit()
    try:
        if source := _find_source(data_dir, seen):
            audit.add(seen)
            _note_dates(source.train, audit)
            return source
        if not _is_unused(data_dir):
            raise DataError(_refusal(data_dir))
    except DataError:
        _survey(data_dir, MAX_DEPTH, audit)
        raise
    return _food101(download_food101(data_dir), audit)


def _exists(folder: Path) -> bool:
    try:
        folder.stat()
    except FileNotFoundError:
        return False
    return True


def _find_source(data_dir: Path, audit: Audit) -> Source | None:
    for folder in _nested(data_dir):
        for read in READERS:
            if source := read(folder, audit):
                return source
    return None


def _nested(folder: Path) -> Iterator[Path]:
    """Yield a folder, then the only folder in it, and so on: archives unpack to one too many."""
    for _ in range(MAX_DEPTH):
        yield folder
        inner = [path for path in list_subfolders(folder).values() if not _is_sample(path)]
        if len(inner) != 1:
            return
        folder = inner[0]


def _is_sample(folder: Path) -> bool:
    return folder.name == SAMPLE_NAME and (folder / "food-101").is_dir()


def _is_unused(folder: Path) -> bool:
    """Say whether Food-101 may be downloaded here: there is nothing like photos or an archive."""
    return not any(_may_be_data(entry) for entry in list_folder(folder))


def _may_be_data(entry: "os.DirEntry[str]") -> bool:
    if is_folder(entry):
        return not _is_sample(Path(entry.path))
    return is_image(entry) or is_unread_picture(entry.name) or is_archive(entry.name)


def _refusal(data_dir: Path) -> str:
    """Say what --data_dir needs, and what is there instead."""
    *_, folder = _nested(data_dir)
    message = (
        f"{folder} has no class folder with images in it; --data_dir needs food-101/, train/ with "
        "one folder of images per class, or the class folders themselves"
    )
    files = [entry for entry in list_folder(folder) if not is_folder(entry)]
    if packed := [entry.name for entry in files if is_archive(entry.name)]:
        message += f"; unpack {join_names(packed)} first"
    if loose := [entry.name for entry in files if is_image(entry)]:
        message += f"; its images lie in no class folder: {join_names(loose, 3)}"
    if inner := [name for name, path in list_subfolders(folder).items() if _has_classes(path)]:
        message += f"; there are folders of images in {join_names(inner)}: give one of these"
    return message


def _has_classes(folder: Path) -> bool:
    try:
        return bool(images_by_class(folder, Audit()))
    except OSError:
        return False


def _survey(folder: Path, depth: int, audit: Audit) -> None:
    """Note what is there but not read, where the whole folder is refused."""
    try:
        entries = list_folder(folder)
    except OSError as error:
        audit.skip(folder, os_reason(error))
        return
    for entry in entries:
        if is_folder(entry):
            if depth:
                _survey(Path(entry.path), depth - 1, audit)
        elif not is_image(entry):
            skip_by_ending(entry, audit)


def _note_dates(images: ImagesByClass, audit: Audit) -> None:
    """Photo libraries export a folder per day, year or camera, which is rarely a dish."""
    if dates := [name for name in images if NOT_A_DISH.fullmatch(name)]:
        audit.notes.append(
            f"warning: classes named after dates or cameras: {join_names(dates)}; move these "
            "folders elsewhere unless they are dishes"
        )


# Readers --------------------------------------------------------------------------------------


def _read_food101(folder: Path, audit: Audit) -> Source | None:
    """Read food-101/ in a folder, or the folder itself; it has meta/ and images/."""
    inner = folder / "food-101"
    for place in (inner, folder):
        if place.is_dir() and {"meta", "images"} <= list_subfolders(place).keys():
            return _food101(place, audit)
    if inner.is_dir() and not (inner / "food-101").is_dir():
        raise DataError(
            f"{inner} is incomplete (it needs meta/ and images/); delete or rename it, and the "
            "next start downloads Food-101 again"
        )
    return None


def _food101(folder: Path, audit: Audit) -> Source:
    train, test = list_food101(folder, audit)
    return Source(f"Food-101 in {folder}", train, None, test)


def _read_splits(folder: Path, audit: Audit) -> Source | None:
    """Read train/ and, beside it, val/ and test/, in any common spelling."""
    subfolders = list_subfolders(folder)
    found = {normalize_class_name(name): path for name, path in subfolders.items()}
    folders = {
        split: next(found[name] for name in names if name in found)
        for split, names in SPLIT_NAMES.items()
        if found.keys() & set(names)
    }
    if "train" not in folders:
        return None
    images = {split: _classes_below(path, audit) for split, path in folders.items()}
    if not images["train"]:
        if len(subfolders) == 1 and list_subfolders(folders["train"]):
            return None  # this train/ may be one folder too many
        raise DataError(_no_classes_in(folders["train"]))
    if unused := [name for name, path in subfolders.items() if path not in folders.values()]:
        used = ", ".join(path.name for path in folders.values())
        audit.notes.append(f"not used, beside {used}: {join_names(unused)}")
    name = f"image folders in {folder}"
    return Source(name, images["train"], images.get("val") or None, images.get("test") or None)


def _classes_below(folder: Path, audit: Audit) -> ImagesByClass:
    """List the classes in a folder, or in the only folder in it."""
    for inner in _nested(folder):
        seen = Audit()
        if images := images_by_class(inner, seen):
            break
    audit.add(seen)
    return images


def _no_classes_in(train: Path) -> str:
    message = f"{train} has no class folder with images in it"
    if loose := [entry.name for entry in list_folder(train) if is_image(entry)]:
        return (
            f"{message}; move its {len(loose):,} images into folders named after their class, "
            f"such as {train.name}/bread/{loose[0]}"
        )
    return f"{message}; put one folder of images per class into it"


def _read_class_folders(folder: Path, audit: Audit) -> Source | None:
    """Read one folder of images per class."""
    names = {normalize_class_name(name) for name in list_subfolders(folder)}
    if names and names <= ALL_SPLIT_NAMES - set(SPLIT_NAMES["train"]):
        raise DataError(
            f"{folder} has {join_names(sorted(names))} and no train/; put the training images "
            "into train/, in one folder per class"
        )
    seen = Audit()
    images = images_by_class(folder, seen)
    if not images:
        return None
    audit.add(seen)
    if odd := sorted(images.keys() & ALL_SPLIT_NAMES):
        audit.notes.append(
            f"warning: {join_names(odd)} counts as a class, as there is no train/ in {folder}"
        )
    return Source(f"image folders in {folder}", images)


# Adding a data set means adding its reader here; the first that knows a folder lists it.
READERS = (_read_food101, _read_splits, _read_class_folders)


# Custom classes -------------------------------------------------------------------------------


def load_custom(root: Path, audit: Audit, known: Collection[str] = ()) -> ImagesByClass:
    """List the images of each custom class, each of them decoded once.

    known: the classes of the data set; what joins one of them may be a single image.

    Up to 5% of unreadable files are skipped and named, as among the images of the data set. More
    of them are an error, as is anything else that is wrong.

    Raises:
        DataError: it lists every offender. OSError: the folder cannot be read.
    """
    if not _exists(root):
        audit.notes.append(f"warning: no custom data in {root}; continuing without it")
        return {}
    folder = _custom_folder(root)
    folders = class_folders(folder, audit)
    images = {
        name: [image for path in paths for image in list_images(path, audit)]
        for name, paths in folders.items()
    }
    reasons = _unreadable([path for paths in images.values() for path in paths])
    readable = {n: [p for p in paths if p not in reasons] for n, paths in images.items()}
    problems = _loose_images(folder) + _unusable_classes(folders, readable, known)
    if problems or len(reasons) > MAX_UNREADABLE * sum(map(len, images.values())):
        problems += [f"{Path(p).relative_to(folder)}: {why}" for p, why in sorted(reasons.items())]
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise DataError(f"problems with the custom data in {folder}: {len(problems):,}{lines}")
    for path, reason in reasons.items():
        audit.skip(path, reason)
    _note_dates(readable, audit)
    return readable


def _custom_folder(root: Path) -> Path:
    """Return the folder with the class folders: root, or the only folder in it."""
    for folder in _nested(root):
        if images_by_class(folder, Audit()):
            return folder
    return root


def _loose_images(folder: Path) -> list[str]:
    files = [entry for entry in list_folder(folder) if not is_folder(entry)]
    return [f"{entry.name}: not in a class folder" for entry in files if is_image(entry)]


def _unusable_classes(
    folders: dict[str, list[Path]], readable: ImagesByClass, known: Collection[str]
) -> list[str]:
    if not folders:
        return ["no class folders, such as biryani/ or dosa/, with images in them"]
    if folders.keys() <= ALL_SPLIT_NAMES:
        return [f"{join_names(sorted(folders))}: splits, not classes; give the one with the images"]
    problems = []
    for name, paths in readable.items():
        spelled = ", ".join(folder.name for folder in folders[name])
        needed = 1 if name in known else MIN_NEW_CLASS_IMAGES
        if not name:
            problems.append(f"{spelled}: no letter or digit in the name to call the class by")
        elif len(paths) < needed:
            problems.append(f"{spelled}: readable images: {len(paths)}, needed: {needed}")
    return problems


def _unreadable(paths: Sequence[str]) -> dict[str, str]:
    """Return path -> reason, for each image that does not decode."""
    reasons = {}
    with ThreadPoolExecutor(min(8, num_cores())) as pool:  # Pillow decodes without the GIL
        for done, (path, reason) in enumerate(pool.map(_try_decoding, paths), start=1):
            if reason:
                reasons[path] = reason
            if done % PROGRESS_EVERY == 0:
                logger.info("checked %s of %s custom images", f"{done:,}", f"{len(paths):,}")
    return reasons


def _try_decoding(path: str) -> tuple[str, str]:
    """Return the path, and the reason why not or ""."""
    try:
        load_image(path, TRAINING_LIMITS)
    except ImageError as error:
        return path, str(error)
    except OSError as error:
        return path, os_reason(error)
    return path, ""
