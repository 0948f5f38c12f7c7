"""Which image, which label, which split: the data of a run as three lists of paths.

Images of the data set are listed but not opened, so 101,000 are ready in seconds;
`training.data.loader` decodes them, and names those that it cannot. Custom images are few and new,
so each is decoded once before training starts.

How a class is split follows from the seed and its own file names alone: adding a class, or listing
folders in another order, moves no image of another class.
"""

import hashlib
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.ml.class_names import normalize_class_name
from training.data.folders import (
    Audit,
    ImagesByClass,
    is_archive,
    join_names,
    with_close_matches,
)
from training.data.labels import apply_labels, describe_labels
from training.data.sources import Source, load_custom, load_source
from training.errors import DataError

# Up to this share of the classes is skipped for having too few images; more are an error.
MAX_SMALL_CLASSES = 0.1
UNEVEN = 5  # the largest class has this many times the training images of the smallest


@dataclass(frozen=True)
class Split:
    """paths: absolute; labels: int64 (n,), the class index of each path."""

    paths: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class FoodData:
    """class_to_idx: bijection onto 0..n-1; notes: lines to print; audit: JSON-able record."""

    class_to_idx: dict[str, int]
    train: Split
    val: Split
    test: Split
    notes: list[str]
    audit: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        """Return the class names in the order of the labels."""
        return sorted(self.class_to_idx, key=self.class_to_idx.__getitem__)


def load_food_data(
    data_dir: Path,
    *,
    custom_data_dir: Path | None = None,
    labels: Path | None = None,
    classes: Sequence[str] | None = None,
    images_per_class: int | None = None,
    train_split: float = 0.8,
    seed: int = 42,
) -> FoodData:
    """List the data, merge the custom classes, split.

    1 - train_split of each class's training images (at least one) is its validation split. Where
    the data set has no test split, and for custom classes, the same share of all images is set
    aside for the test first. images_per_class keeps the first N of each class's shuffled training
    images, validation included, and at most N of a given validation or test split.

    labels: a file of corrected labels, see `training.data.labels`; it moves no photo between the
    splits.

    Raises:
        DataError: for everything that is wrong with the data or the request.
    """
    _check_request(images_per_class, train_split)
    audit = Audit()
    with _saying_what_was_skipped(audit):
        source, custom = _load(data_dir, custom_data_dir, audit)
        known = source.train.keys() | custom.keys()
        if classes:
            _select_classes(classes, source, custom, audit)
        _skip_small_classes(source, custom, audit, may_skip=not classes)
        _check_enough(source, custom)
    class_to_idx = build_class_to_idx(source.train, custom)
    parts = split_images(source, custom, 1 - train_split, images_per_class, seed)
    corrected = None
    if labels:
        parts, corrected = apply_labels(labels, parts, folders_of(data_dir, custom_data_dir), known)
    splits = {split: _as_split(images, class_to_idx) for split, images in parts.items()}
    record: dict[str, Any] = {
        "source": source.name,
        "seed": seed,
        "counts": {name: {s: len(parts[s].get(name, ())) for s in parts} for name in class_to_idx},
        "skipped": audit.skipped,
        "duplicates": find_duplicates(splits),
        "custom": _describe_merge(source, custom),
    }
    if corrected:
        record["labels"] = corrected
    notes = [*audit.notes, *_describe(record), *audit.describe_skipped(), *_merge_table(record)]
    return FoodData(class_to_idx, **splits, notes=notes, audit=record)


def folders_of(data_dir: Path, custom_data_dir: Path | None) -> list[Path]:
    """Return the folders to which the paths in a file of labels are relative."""
    folders = [data_dir] if custom_data_dir is None else [data_dir, custom_data_dir]
    return [_real(folder) for folder in folders]


def build_class_to_idx(base: Iterable[str], custom: Iterable[str]) -> dict[str, int]:
    """Number the classes: sorted base names first, so that custom classes only extend them."""
    known = sorted(set(base))
    return {name: i for i, name in enumerate(known + sorted(set(custom) - set(known)))}


def _check_request(images_per_class: int | None, train_split: float) -> None:
    if not 0 < train_split < 1:
        raise DataError(f"train_split is {train_split}; it must lie between 0 and 1, such as 0.8")
    if images_per_class is not None and images_per_class < 2:
        raise DataError(
            f"images_per_class is {images_per_class}; each class needs at least 2 images, one to "
            "train on and one to validate with"
        )


# Listing --------------------------------------------------------------------------------------


@contextmanager
def _saying_what_was_skipped(audit: Audit) -> Iterator[None]:
    """Add to a refusal what was skipped, as that is often its cause."""
    try:
        yield
    except DataError as error:
        lines = audit.describe_skipped()
        if not lines:
            raise
        separator = "\n" if "\n" in str(error) else "; "
        raise DataError(separator.join([str(error), *lines])) from error.__cause__


def _load(
    data_dir: Path, custom_data_dir: Path | None, audit: Audit
) -> tuple[Source, ImagesByClass]:
    with _naming("--data_dir", data_dir) as folder:
        source = load_source(folder, audit)
    if custom_data_dir is None:
        return source, {}
    with _naming("--custom_data_dir", custom_data_dir) as folder:
        return source, load_custom(folder, audit, source.train)


@contextmanager
def _naming(flag: str, folder: Path) -> Iterator[Path]:
    """Give the absolute path of a folder; an OSError becomes a DataError that names the flag."""
    path = _real(folder)
    try:
        if path.is_file():
            remedy = "unpack it and give the folder" if is_archive(path.name) else "give a folder"
            raise DataError(f"{flag} {folder} is a file; {remedy}")
        yield path
    except OSError as error:
        raise DataError(
            f"{flag}: {error.filename or path} cannot be read ({error.strerror}); check that it is "
            "there and that you may open it"
        ) from error


def _real(folder: Path) -> Path:
    return Path(os.path.realpath(Path(folder).expanduser()))  # never raises, as resolve() may


# Choosing classes -----------------------------------------------------------------------------


def _select_classes(
    wanted: Sequence[str], source: Source, custom: ImagesByClass, audit: Audit
) -> None:
    """Keep only the wanted classes, in every split."""
    known = build_class_to_idx(source.train, custom)
    keep = {normalize_class_name(name): name for name in wanted}
    if unknown := [name for key, name in keep.items() if key not in known]:
        hints = ", ".join(with_close_matches(name, known) for name in unknown)
        raise DataError(f"no such class: {hints}; the data has {len(known)} classes, see --classes")
    if dropped := sorted(custom.keys() - keep.keys()):
        audit.notes.append(f"custom classes that --classes leaves out: {join_names(dropped)}")
    _drop_classes(set(known) - keep.keys(), source, custom)


def _drop_classes(names: Iterable[str], source: Source, custom: ImagesByClass) -> None:
    for images in (source.train, source.val, source.test, custom):
        for name in names:
            if images is not None:
                images.pop(name, None)


def _skip_small_classes(
    source: Source, custom: ImagesByClass, audit: Audit, *, may_skip: bool
) -> None:
    """Skip a few classes with too few training images among many; otherwise they are an error."""
    needed = 1 + (source.val is None) + (source.test is None)
    everything = {**(source.test or {}), **(source.val or {}), **source.train}
    counts = {
        name: len(source.train.get(name, ())) for name in sorted(everything.keys() - custom.keys())
    }
    small = {name: count for name, count in counts.items() if count < needed}
    if not small:
        return
    if not may_skip or len(small) > MAX_SMALL_CLASSES * len(counts):
        listed = ", ".join(f"{name} ({count})" for name, count in small.items())
        raise DataError(
            f"{source.name}: too few training images in {listed}; each class needs {needed} or "
            "more, so add some, or move these folders elsewhere"
        )
    for name in small:
        folder = next(map(os.path.dirname, everything[name]), name)
        audit.skip(folder, f"a class of fewer than {needed} training images")
    _drop_classes(small, source, custom)


def _check_enough(source: Source, custom: ImagesByClass) -> None:
    names = source.train.keys() | custom.keys()
    if len(names) < 2:
        only = join_names(names) or "none"
        raise DataError(f"{source.name}: at least 2 classes are needed, found only: {only}")
    if source.test is not None and not any([*source.test.values(), *custom.values()]):
        raise DataError(
            f"{source.name}: no test images for these classes; add some to its test split"
        )


# Splitting ------------------------------------------------------------------------------------


def split_images(
    source: Source, custom: ImagesByClass, share: float, limit: int | None, seed: int
) -> dict[str, ImagesByClass]:
    """Return train, val and test, each class -> paths, in the seeded order.

    A share of each class is taken for a split that the data set lacks; custom classes have none:

        the data set has    test                         val
        train               a share of train, custom     a share of the rest of both
        train, val          a share of train, custom     val, and a share of custom
        train, test         test, and a share of custom  a share of train and the rest of custom
        train, val, test    test, and a share of custom  val, and a share of custom
    """

    def take(images: ImagesByClass, keep: int) -> tuple[ImagesByClass, ImagesByClass]:
        return _take_share(images, share, seed, keep)

    def merge(images: ImagesByClass, more: ImagesByClass) -> ImagesByClass:
        return _merge(images, more, limit, seed)

    train, test = source.train, source.test
    if test is None:
        train, test = take(train, keep=1 + (source.val is None))
    custom, custom_test = take(custom, keep=2)
    if source.val is None:
        train, val = take(merge(train, custom), keep=1)
    else:
        custom, custom_val = take(custom, keep=1)
        train, val = merge(train, custom), merge(source.val, custom_val)
    return {"train": train, "val": val, "test": merge(test, custom_test)}


def _take_share(
    images: ImagesByClass, share: float, seed: int, keep: int
) -> tuple[ImagesByClass, ImagesByClass]:
    """Return the rest and a share of each class: one image at least, while `keep` stay."""
    rest: ImagesByClass = {}
    taken: ImagesByClass = {}
    for name, paths in images.items():
        order = shuffled(paths, name, seed)
        count = max(0, min(max(1, round(len(order) * share)), len(order) - keep))
        taken[name], rest[name] = order[:count], order[count:]
    return rest, taken


def _merge(
    images: ImagesByClass, more: ImagesByClass, limit: int | None, seed: int
) -> ImagesByClass:
    """Join both, each class shuffled and cut after `limit`."""
    return {
        name: shuffled(images.get(name, []) + more.get(name, []), name, seed)[:limit]
        for name in {**images, **more}
    }


def shuffled(paths: Iterable[str], class_name: str, seed: int) -> list[str]:
    """Order images by nothing but seed, class name and file names."""
    errors = sys.getfilesystemencodeerrors()  # names of files need not be text

    def key(path: str) -> tuple[bytes, str]:
        text = f"{seed}/{class_name}/{os.path.basename(path)}"
        return hashlib.sha256(text.encode("utf-8", errors)).digest(), path

    return sorted(paths, key=key)


def _as_split(images: ImagesByClass, class_to_idx: Mapping[str, int]) -> Split:
    pairs = [(path, i) for name, i in class_to_idx.items() for path in images.get(name, ())]
    labels = np.array([label for _, label in pairs], dtype=np.int64)
    return Split(tuple(path for path, _ in pairs), labels)


# What to tell ---------------------------------------------------------------------------------


def find_duplicates(splits: Mapping[str, Split]) -> list[dict[str, list[str]]]:
    """Find identical files in more than one split: [{"train": [paths], "test": [paths]}, …].

    Sizes are compared first, then 4 kB from the middle; what still agrees is read whole.
    """
    part_of = {path: part for part, split in splits.items() for path in split.paths}
    groups = [list(part_of)]
    for key in (_size, _middle, _content):
        finer = (g for group in groups for g in _grouped(group, key))
        groups = [group for group in finer if len({part_of[path] for path in group}) > 1]
    return [
        {part: sorted(path for path in group if part_of[path] == part) for part in splits}
        for group in sorted(map(sorted, groups))
    ]


def _grouped(paths: Iterable[str], key: Callable[[str], Hashable]) -> list[list[str]]:
    groups = defaultdict(list)
    for path in paths:
        try:
            groups[key(path)].append(path)
        except OSError:  # unreadable files are reported when decoded
            continue
    return list(groups.values())


def _size(path: str) -> int:
    return os.path.getsize(path)


def _middle(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(_size(path) // 2)
        return file.read(4096)


def _content(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


def _describe(record: Mapping[str, Any]) -> list[str]:
    """Say what was found, from the record."""
    counts: dict[str, dict[str, int]] = record["counts"]
    sizes = {s: sum(c[s] for c in counts.values()) for s in ("train", "val", "test")}
    images = ", ".join(f"{size:,} {split}" for split, size in sizes.items())
    notes = [f"{record['source']}: {len(counts):,} classes, {images} images"]
    for split in sizes:
        if bare := [name for name, count in counts.items() if not count[split]]:
            notes.append(f"warning: no {split} images for {join_names(bare)}")
    notes += _uneven({name: count["train"] for name, count in counts.items()})
    if duplicates := record["duplicates"]:
        first = " = ".join(paths[0] for paths in duplicates[0].values() if paths)
        notes.append(
            f"warning: pictures in more than one split: {len(duplicates):,}, such as {first}"
        )
    if "labels" in record:
        notes += describe_labels(record["labels"])
    return notes


def _uneven(train_counts: Mapping[str, int]) -> list[str]:
    """Say that classes differ much in size, and what can be done about it."""
    small = min(train_counts, key=train_counts.__getitem__)
    large = max(train_counts, key=train_counts.__getitem__)
    fewest, most = train_counts[small], train_counts[large]
    if most < UNEVEN * fewest:
        return []
    return [
        f"warning: uneven classes, {fewest:,} training images of {small} and {most:,} of {large}: "
        f"add photos of the small ones, or limit the others with --images_per_class; the report's "
        "balanced accuracy counts each class the same"
    ]


def _describe_merge(source: Source, custom: ImagesByClass) -> list[dict[str, Any]]:
    return [
        {"class": name, "images": len(custom[name]), "joins": len(source.train.get(name, ()))}
        for name in sorted(custom)
    ]


def _merge_table(record: Mapping[str, Any]) -> list[str]:
    if not (rows := record["custom"]):
        return []
    width = max(len("Custom class"), *(len(row["class"]) for row in rows))
    lines = [f"{'Custom class':<{width}}  images"]
    for row in rows:
        role = f"joins {row['joins']:,} training images" if row["joins"] else "new class"
        lines.append(f"{row['class']:<{width}}  {row['images']:>6,}  {role}")
    return lines
