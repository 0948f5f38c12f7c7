"""A run's lists of images: saved where a person can read them, found again, compared.

`images.json` in the run folder says for each split and class which images belong to the run. A
resumed run reads it when its data folder has moved or lost images, so that no image ever changes
its split.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from app.ml.durable import write_durably
from training.config import TrainingConfig
from training.data.sources import SAMPLE_NAME
from training.data.splits import FoodData, Split
from training.errors import CheckpointError

MANIFEST_NAME = "images.json"
SPLITS = ("train", "val", "test")


def fingerprint(data: FoodData) -> str:
    """Digest what changes when an image is added, removed, relabeled or moved between splits."""
    digest = hashlib.sha256(json.dumps(data.class_to_idx, sort_keys=True).encode())
    for split in _splits(data):
        names = (f"{Path(p).parent.name}/{Path(p).name}" for p in split.paths)
        digest.update("\n".join(names).encode("utf-8", "surrogateescape"))
        digest.update(split.labels.tobytes())
    return digest.hexdigest()


def describe(data: FoodData, digest: str, config: TrainingConfig) -> dict[str, object]:
    """Say what a run trains on: name, digest (see `fingerprint`), source and counts."""
    source = data.audit["source"].partition(" in ")[2]  # after what kind of data set it is
    folders = [Path(source), *([config.custom_data_dir] if config.custom_data_dir else [])]
    return {
        "name": SAMPLE_NAME if config.sample else " + ".join(f.resolve().name for f in folders),
        "digest": digest[:16],
        "source": ", ".join(str(folder.resolve()) for folder in folders),
        "classes": len(data.class_to_idx),
        **{part: len(split) for part, split in zip(SPLITS, _splits(data), strict=True)},
    }


def write_manifest(run_dir: Path, data: FoodData) -> None:
    """Write a run's lists of images, once."""
    names = data.classes
    lists: dict[str, dict[str, list[str]]] = {}
    for part, split in zip(SPLITS, _splits(data), strict=True):
        lists[part] = {name: [] for name in names}
        for path, label in zip(split.paths, split.labels.tolist(), strict=True):
            lists[part][names[label]].append(path)
    values = {"class_to_idx": data.class_to_idx, **lists, "notes": data.notes, "audit": data.audit}
    write_durably(run_dir / MANIFEST_NAME, json.dumps(values, indent=1).encode())


def read_manifest(run_dir: Path) -> FoodData:
    """Read the lists that a run began with.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = run_dir / MANIFEST_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        class_to_idx = values["class_to_idx"]
        splits = {part: _as_split(values[part], class_to_idx) for part in SPLITS}
        return FoodData(class_to_idx, **splits, notes=values["notes"], audit=values["audit"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); without it a run whose images have changed cannot "
            "be resumed"
        ) from error


def data_of_run(run_dir: Path, expected: str, now: FoodData) -> FoodData:
    """Return the images that a run began with, at the places where they are now.

    Those that are gone keep their path, so that they are named and skipped.

    Args:
        expected: the fingerprint in the run's checkpoint. now: what is there today.

    Raises:
        CheckpointError: the run's list is missing, or is another one.
    """
    if expected == fingerprint(now):
        return now
    then = read_manifest(run_dir)
    if expected != fingerprint(then):
        raise CheckpointError(f"{run_dir / MANIFEST_NAME} does not belong to its checkpoints")
    anywhere = {_place(path): path for split in _splits(now) for path in split.paths}
    count = Counter(_place(path) for split in _splits(then) for path in split.paths)
    unique = {place: path for place, path in anywhere.items() if count[place] == 1}
    pairs = zip(_splits(then), _splits(now), strict=True)
    train, val, test = (_found_again(before, after, unique) for before, after in pairs)
    return FoodData(then.class_to_idx, train, val, test, then.notes, then.audit)


def what_is_new(now: FoodData, then: FoodData) -> list[str]:
    """Say why a run that began with other lists cannot continue with today's; [] if it can.

    Missing images are tolerated: they are skipped, as they are when they go during training.
    """
    if now.class_to_idx != then.class_to_idx:
        changed = sorted(now.class_to_idx.keys() ^ then.class_to_idx.keys())
        return [f"the classes differ ({', '.join(changed)})"]
    if labels_of(now) != labels_of(then):
        return ["the labels differ (--labels)"]
    # Over all splits: where the data has no test split, one image less shifts the splits.
    known = {_place(path) for split in _splits(then) for path in split.paths}
    new = [p for split in _splits(now) for p in split.paths if _place(p) not in known]
    return [f"{len(new)} new images, e.g. {new[0]}"] if new else []


def labels_of(data: FoodData) -> str | None:
    """Return the digest of what the file of labels said; None without one."""
    labels = data.audit.get("labels")
    return labels["sha256"] if labels else None


def _found_again(before: Split, after: Split, unique: Mapping[tuple[str, str], str]) -> Split:
    """unique: images of any split whose class and name only one image had."""
    places = {**unique, **{_place(path): path for path in after.paths}}
    paths = (p if Path(p).exists() else places.get(_place(p), p) for p in before.paths)
    return Split(tuple(paths), before.labels)


def _as_split(images: Mapping[str, list[str]], class_to_idx: Mapping[str, int]) -> Split:
    pairs = [(path, class_to_idx[name]) for name, paths in images.items() for path in paths]
    labels = np.array([label for _, label in pairs], dtype=np.int64)
    return Split(tuple(path for path, _ in pairs), labels)


def _splits(data: FoodData) -> tuple[Split, Split, Split]:
    return data.train, data.val, data.test


def _place(path: str) -> tuple[str, str]:
    """An image's class folder and name: the data folder may have moved."""
    return Path(path).parent.name, Path(path).name
