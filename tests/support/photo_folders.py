"""Folders of tiny photos, laid out in the ways that data sets come in."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from training.data.splits import FoodData


def write_images(folder: Path, count: int) -> None:
    """Write `count` tiny JPEGs, no two with the same bytes in a whole test tree."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        digest = hashlib.sha256(f"{folder}/{i}".encode("utf-8", "surrogateescape")).digest()
        image = Image.frombytes("RGB", (3, 3), digest[:27])
        image.save(folder / f"{i:04d}.jpg", comment=digest.hex())


def write_tree(root: Path, classes: Mapping[str, int]) -> Path:
    for name, count in classes.items():
        write_images(root / name, count)
    return root


def write_food101(folder: Path, classes: Mapping[str, tuple[int, int]]) -> Path:
    """Write Food-101's own layout, class -> (train, test) counts; return the folder above it."""
    lists: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for name, (train, test) in classes.items():
        write_images(folder / "images" / name, train + test)
        ids = [f"{name}/{i:04d}" for i in range(train + test)]
        lists["train"][name], lists["test"][name] = ids[:train], ids[train:]
    (folder / "meta").mkdir()
    for split, ids_of in lists.items():
        (folder / "meta" / f"{split}.json").write_text(json.dumps(ids_of))
    return folder.parent


def counts(data: FoodData) -> tuple[int, int, int]:
    return len(data.train), len(data.val), len(data.test)


def all_paths(data: FoodData) -> tuple[tuple[str, ...], ...]:
    return data.train.paths, data.val.paths, data.test.paths
