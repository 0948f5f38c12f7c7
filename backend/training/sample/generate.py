"""Draw a small data set of synthetic plates in Food-101's layout: training with no download.

draw_sample(Path("data/sample"))    # ten dishes, 45 train + 15 test pictures each, in seconds
"""

import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from training.sample.dishes import SAMPLE_CLASSES, draw_dish

FORMAT = 1  # raise it when the drawings change, and folders drawn before are drawn anew
SHARE_FROM = 80  # fewer pictures than this are drawn sooner than other processes start

BACKEND = Path(__file__).resolve().parents[2]

logger = logging.getLogger(__name__)

Plan = dict[str, dict[str, list[str]]]
# {split: {class: ids}}, an id being class/number as in Food-101


def _plan(images_per_class: int, test_per_class: int) -> Plan:
    first_test = images_per_class - test_per_class
    numbers = {"train": range(first_test), "test": range(first_test, images_per_class)}
    return {
        split: {name: [f"{name}/{1000 + i}" for i in chosen] for name in SAMPLE_CLASSES}
        for split, chosen in numbers.items()
    }


def draw_share(images: Path, seed: int, indices: range) -> None:
    """Draw the pictures with these numbers, of every class, into folders that are there."""
    for index in indices:
        for name in SAMPLE_CLASSES:
            picture, quality = draw_dish(name, seed, index)
            picture.save(images / name / f"{1000 + index}.jpg", quality=quality)


def _draw_images(images: Path, seed: int, images_per_class: int) -> None:
    for name in SAMPLE_CLASSES:
        (images / name).mkdir(parents=True)
    workers = min(os.cpu_count() or 1, images_per_class)
    if images_per_class * len(SAMPLE_CLASSES) < SHARE_FROM or workers == 1:
        draw_share(images, seed, range(images_per_class))
    else:
        _draw_in_shares(images, seed, images_per_class, workers)


def _draw_in_shares(images: Path, seed: int, images_per_class: int, workers: int) -> None:
    """Draw in processes that import this module alone.

    Those of a process pool would first import the training script, with PyTorch and all.
    """
    command = [sys.executable, "-m", "training.sample.generate", str(images.resolve()), str(seed)]
    path = os.pathsep.join(filter(None, [str(BACKEND), os.environ.get("PYTHONPATH")]))
    with contextlib.ExitStack() as stack:
        shares = []
        for first in range(workers):
            share = [*command, str(first), str(images_per_class), str(workers)]
            process = subprocess.Popen(
                share, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
            )
            shares.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in shares:
            _, said = process.communicate()
            if process.returncode:
                reason = (said.splitlines() or [f"exit code {process.returncode}"])[-1]
                raise OSError(f"the sample could not be drawn into {images}: {reason}")


def _write_meta(meta: Path, plan: Plan) -> None:
    meta.mkdir()
    labels = [name.replace("_", " ").capitalize() for name in SAMPLE_CLASSES]
    lists: dict[str, Sequence[str]] = {"classes": SAMPLE_CLASSES, "labels": labels}
    for split, ids in plan.items():
        (meta / f"{split}.json").write_text(json.dumps(ids), encoding="utf-8")
        lists[split] = [i for group in ids.values() for i in group]
    for stem, lines in lists.items():
        (meta / f"{stem}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _files(folder: Path, plan: Plan) -> Iterator[Path]:
    for stem in ("classes.txt", "labels.txt", "train.txt", "test.txt", "train.json", "test.json"):
        yield folder / "meta" / stem
    for ids in plan.values():
        yield from (folder / "images" / f"{i}.jpg" for group in ids.values() for i in group)


def _about(folder: Path, seed: int, images_per_class: int, test_per_class: int) -> str:
    """The text of DRAWN.txt: what this is, and a checksum over every file, so that damage shows."""
    digest = hashlib.sha256()
    for path in _files(folder, _plan(images_per_class, test_per_class)):
        digest.update(path.read_bytes())
    return (
        "These pictures are drawn by NutriLearn's own code. They are not photographs, and a model\n"
        "trained on them knows nothing about real food: they show that the whole training job\n"
        "works, with no download. The folder has Food-101's layout. It is drawn anew when one of\n"
        "its files is missing or changed, so keep your own pictures elsewhere.\n\n"
        f"format {FORMAT}, seed {seed}, images per class {images_per_class}, "
        f"of which test {test_per_class}\n"
        f"sha256 {digest.hexdigest()}\n"
    )


def _is_complete(folder: Path, seed: int, images_per_class: int, test_per_class: int) -> bool:
    try:
        text = (folder / "DRAWN.txt").read_text(encoding="utf-8", errors="replace")
        return text == _about(folder, seed, images_per_class, test_per_class)
    except FileNotFoundError:
        return False


def _draw_folder(folder: Path, seed: int, images_per_class: int, test_per_class: int) -> None:
    _draw_images(folder / "images", seed, images_per_class)
    _write_meta(folder / "meta", _plan(images_per_class, test_per_class))
    about = _about(folder, seed, images_per_class, test_per_class)
    (folder / "DRAWN.txt").write_text(about, encoding="utf-8")


def draw_sample(
    root: Path, seed: int = 42, images_per_class: int = 60, test_per_class: int = 15
) -> Path:
    """Draw the sample set under `root` unless it is there already, and return `root/food-101`.

    The folder appears whole or not at all. Raises ValueError for counts that leave a split empty,
    and FileExistsError when `root/food-101` holds something that was not drawn here, such as
    Food-101 itself: that is never replaced.
    """
    if not 1 <= test_per_class < images_per_class:
        raise ValueError(
            f"test_per_class is {test_per_class} of {images_per_class} images per class: "
            "choose at least 1, and leave at least 1 to train on."
        )
    target, settings = root / "food-101", (seed, images_per_class, test_per_class)
    if target.exists() and any(target.iterdir()) and not (target / "DRAWN.txt").exists():
        raise FileExistsError(
            f"{target} holds pictures that --sample did not draw, so it is left alone: "
            "choose another --data_dir for the sample set."
        )
    if not _is_complete(target, *settings):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".food-101-", dir=root) as scratch:
            _draw_folder(Path(scratch) / "new", *settings)
            if target.exists():
                target.rename(Path(scratch) / "old")
            (Path(scratch) / "new").rename(target)
    total = images_per_class * len(SAMPLE_CLASSES)
    logger.info(
        "Sample set: %d pictures in %s, drawn by this project, not photographs.", total, target
    )
    return target


if __name__ == "__main__":
    folder, seed, *numbers = sys.argv[1:]
    draw_share(Path(folder), int(seed), range(*map(int, numbers)))
