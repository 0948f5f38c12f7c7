"""Which images, which label, which split: the data of a run as three lists of paths.

Nothing of the base dataset is opened here, only listed, so 101,000 images are ready in seconds;
`training.data.loader` decodes, and names what it cannot decode. Custom images are few and new, so
each of them is decoded once before training starts.

The order in which a class is split depends on the seed and its own file names alone: adding a
class, or listing folders in another order, moves no image of another class.
"""

import difflib
import hashlib
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.ml.preprocessing import ImageError, load_image
from training.data.sources import (
    BaseData,
    Findings,
    Pools,
    class_folders,
    images_in,
    is_image_name,
    listing,
    load_base,
    normalise_class_name,
    shuffled,
    visible,
)
from training.errors import DataError

log = logging.getLogger(__name__)

MIN_CUSTOM_IMAGES = 5  # leaves three to train on, beside one for validation and one for the test
PROGRESS_EVERY = 5000  # custom images between two lines of progress


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


def load_food_data(
    data_dir: Path,
    *,
    custom_data_dir: Path | None = None,
    classes: Sequence[str] | None = None,
    images_per_class: int | None = None,
    train_split: float = 0.8,
    seed: int = 42,
) -> FoodData:
    """List the data, merge the custom classes, split.

    1 - train_split of each class's training images (at least one) is its validation part. Where
    the source has no test part (bare class folders, custom classes) the same share of all images
    is set aside for the test first. images_per_class keeps the first N of each class's shuffled
    training images, validation included, and at most N in a given validation or test part.

    Raises:
        DataError: for everything that is wrong with the data or the request.
    """
    _check_request(images_per_class, train_split)
    findings, share = Findings(), 1 - train_split
    try:
        base = load_base(Path(data_dir).expanduser().resolve(), findings)
        custom = _load_custom(custom_data_dir, findings) if custom_data_dir else Pools()
    except NotADirectoryError as error:
        raise DataError(f"{error.filename} is a file; a folder of images is needed.") from error
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read ({error.strerror}); check that it is there and that "
            "you may open it."
        ) from error
    if classes:
        _select_classes(classes, base, custom, findings)
    class_to_idx = build_class_to_idx(base.train, custom)
    parts = _split(base, custom, share, images_per_class, seed)
    splits = {part: _as_split(pools, class_to_idx) for part, pools in parts.items()}
    audit: dict[str, Any] = {
        "source": base.source,
        "seed": seed,
        "counts": {c: {part: len(parts[part].get(c, ())) for part in parts} for c in class_to_idx},
        "left_out": findings.left_out,
        "duplicates": find_duplicates(splits),
        "custom": [
            {"class": name, "images": len(custom[name]), "joins": len(base.train.get(name, ()))}
            for name in sorted(custom)
        ],
    }
    notes = findings.notes + _describe(audit) + _merge_table(audit["custom"])
    return FoodData(class_to_idx, **splits, notes=notes, audit=audit)


def build_class_to_idx(base: Iterable[str], custom: Iterable[str]) -> dict[str, int]:
    """Sorted base names first, so that custom classes only extend what a model already knows."""
    known = sorted(set(base))
    return {name: i for i, name in enumerate(known + sorted(set(custom) - set(known)))}


def _check_request(images_per_class: int | None, train_split: float) -> None:
    if not 0 < train_split < 1:
        raise DataError(f"train_split is {train_split}; it must lie between 0 and 1, such as 0.8.")
    if images_per_class is not None and images_per_class < 2:
        raise DataError(
            f"images_per_class is {images_per_class}; each class needs at least 2 images, one to "
            "train on and one to validate with."
        )


def _select_classes(
    wanted: Sequence[str], base: BaseData, custom: Pools, findings: Findings
) -> None:
    """Keep only the wanted classes, in every pool."""
    known = build_class_to_idx(base.train, custom)
    keep = {normalise_class_name(name): name for name in wanted}
    if unknown := [name for key, name in keep.items() if key not in known]:
        hints = ", ".join(_with_close_matches(name, known) for name in unknown)
        raise DataError(
            f"No such class: {hints}. The data has {len(known)} classes; see --classes."
        )
    if dropped := sorted(custom.keys() - keep.keys()):
        findings.notes.append(f"Custom classes that --classes leaves out: {listing(dropped)}.")
    for pools in (base.train, base.val, base.test, custom):
        for name in set(pools or ()) - keep.keys():
            del pools[name]  # type: ignore[union-attr]  # None has no names to come here with


def _with_close_matches(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(normalise_class_name(name), list(known))
    return f"{name} (did you mean {' or '.join(close)}?)" if close else name


def _load_custom(root: Path, findings: Findings) -> Pools:
    """The images of each custom class, all decoded once; every offender in one DataError."""
    root = Path(root).expanduser().resolve()
    if not root.exists():
        findings.notes.append(f"Warning: there is no custom data in {root}; going on without it.")
        log.warning("There is no custom data in %s; going on without it.", root)
        return {}
    offenders = [
        f"{entry.name}: not in a class folder"
        for entry in visible(root)
        if not entry.is_dir() and is_image_name(entry.name)
    ]
    folders, pools = class_folders(root, findings), Pools()
    if not folders:
        offenders.append("no class folders, such as biryani/ or dosa/, with images in them")
    for name, same in folders.items():
        try:
            pools[name] = [path for folder in same for path in images_in(folder, findings)]
        except OSError as error:
            offenders.append(f"{error.filename}: {error.strerror}")
    reasons = _unreadable([path for paths in pools.values() for path in paths])
    offenders += [f"{Path(path).relative_to(root)}: {reasons[path]}" for path in sorted(reasons)]
    for name, paths in pools.items():
        spelt = ", ".join(folder.name for folder in folders[name])
        count = sum(path not in reasons for path in paths)
        if not name:
            offenders.append(f"{spelt}: no letter in the name to call the class by")
        elif count < MIN_CUSTOM_IMAGES:
            offenders.append(f"{spelt}: readable images: {count}, needed: {MIN_CUSTOM_IMAGES}")
    if offenders:
        lines = "".join(f"\n  {line}" for line in offenders)
        raise DataError(f"The custom data in {root} needs mending ({len(offenders)} found):{lines}")
    return pools


def _unreadable(paths: Sequence[str]) -> dict[str, str]:
    """path -> reason, for each image that does not decode."""
    reasons = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes without the GIL
        for done, (path, reason) in enumerate(pool.map(_try_decoding, paths), start=1):
            if reason:
                reasons[path] = reason
            if done % PROGRESS_EVERY == 0:
                log.info("Checked %s of %s custom images.", f"{done:,}", f"{len(paths):,}")
    return reasons


def _try_decoding(path: str) -> tuple[str, str]:
    """(path, reason why not, or "")"""
    try:
        load_image(path)
    except (ImageError, OSError) as error:
        return path, str(error)
    return path, ""


def _split(
    base: BaseData, custom: Pools, share: float, limit: int | None, seed: int
) -> dict[str, Pools]:
    """train, val and test, each class -> paths, in the seeded order."""
    _check_enough(base, custom)
    train, val, test = base.train, base.val, base.test
    if test is None:
        train, test = _set_aside(train, share, seed, keep=1 + (val is None))
    custom, custom_test = _set_aside(custom, share, seed, keep=2)
    test = _merged(test, custom_test, limit, seed)
    if val is None:
        train, val = _set_aside(_merged(train, custom, limit, seed), share, seed, keep=1)
    else:
        custom, custom_val = _set_aside(custom, share, seed, keep=1)
        train = _merged(train, custom, limit, seed)
        val = _merged(val, custom_val, limit, seed)
    return {"train": train, "val": val, "test": test}


def _check_enough(base: BaseData, custom: Pools) -> None:
    names = base.train.keys() | custom.keys()
    if len(names) < 2:
        raise DataError(f"{base.source}: one class only ({listing([*names])}); at least 2 needed.")
    needed = 1 + (base.val is None) + (base.test is None)
    if few := [f"{c} ({len(p)})" for c, p in sorted(base.train.items()) if len(p) < needed]:
        raise DataError(
            f"{base.source}: too few training images in {listing(few)}; each class needs "
            f"{needed} or more, so add some, or leave the class out with --classes."
        )
    if base.test is not None and not any([*base.test.values(), *custom.values()]):
        raise DataError(
            f"{base.source}: no test images of these classes; add some to its test part."
        )


def _set_aside(pools: Pools, share: float, seed: int, keep: int) -> tuple[Pools, Pools]:
    """(rest, share) of each class; at least one image goes aside and at least `keep` stay."""
    rest, aside = Pools(), Pools()
    for name, paths in pools.items():
        order = shuffled(paths, name, seed)
        count = min(max(1, round(len(order) * share)), len(order) - keep)
        aside[name], rest[name] = order[:count], order[count:]
    return rest, aside


def _merged(base: Pools, custom: Pools, limit: int | None, seed: int) -> Pools:
    """The images of both, each class shuffled and cut after `limit`."""
    return {
        name: shuffled(base.get(name, []) + custom.get(name, []), name, seed)[:limit]
        for name in {**base, **custom}
    }


def _as_split(pools: Pools, class_to_idx: Mapping[str, int]) -> Split:
    pairs = [(path, i) for name, i in class_to_idx.items() for path in pools.get(name, ())]
    labels = np.array([label for _, label in pairs], dtype=np.int64)
    return Split(tuple(path for path, _ in pairs), labels)


def find_duplicates(splits: Mapping[str, Split]) -> list[dict[str, list[str]]]:
    """Byte-identical files in more than one split: [{"train": [paths], "test": [paths]}, …].

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
        except OSError:  # equal to nothing; whoever decodes it names it
            continue
    return list(groups.values())


def _size(path: str) -> int:
    return Path(path).stat().st_size


def _middle(path: str) -> bytes:
    with Path(path).open("rb", buffering=0) as file:
        file.seek(_size(path) // 2)
        return file.read(4096)


def _content(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


def _describe(audit: Mapping[str, Any]) -> list[str]:
    """What a person should read before training starts, from the audit."""
    counts: dict[str, dict[str, int]] = audit["counts"]
    sizes = {p: sum(c[p] for c in counts.values()) for p in ("train", "val", "test")}
    images = ", ".join(f"{size:,} {part}" for part, size in sizes.items())
    notes = [f"{audit['source']}: {len(counts)} classes, {images} images."]
    for part in sizes:
        if bare := [name for name, count in counts.items() if not count[part]]:
            notes.append(f"Warning: no {part} images of {listing(bare)}.")
    for reason, number in Counter(entry["reason"] for entry in audit["left_out"]).items():
        names = [Path(e["path"]).name for e in audit["left_out"] if e["reason"] == reason]
        notes.append(f"Warning: left out, {reason}: {number:,} ({listing(names, 3)}).")
    if duplicates := audit["duplicates"]:
        first = " = ".join(paths[0] for paths in duplicates[0].values() if paths)
        notes.append(f"Warning: pictures in more than one split: {len(duplicates):,}, as {first}.")
    return notes


def _merge_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    width = max(len("Custom class"), *(len(row["class"]) for row in rows))
    lines = [f"{'Custom class':<{width}}  images"]
    for row in rows:
        role = f"joins {row['joins']:,} training images" if row["joins"] else "new class"
        lines.append(f"{row['class']:<{width}}  {row['images']:>6,}  {role}")
    return lines
