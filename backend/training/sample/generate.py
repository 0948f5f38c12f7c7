"""Draw a small Food-101 of ten dishes, to train on with no download.

draw_sample(Path("data/sample"))    # 45 training and 15 test pictures of each dish, in seconds

What is on the plates is in dishes.py; here are the brush, the table, the camera and the files.
Vessels, tables, light and camera vary more than the food does.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from cmath import rect
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFilter

from training.sample.dishes import CLUTTER, DISHES, PIECES, TABLES, Blob, Row, View

FORMAT = 2  # raise it when the drawings change: sets drawn before are then drawn again
SHARE_FROM = 80  # fewer pictures than this are drawn sooner than other processes start
BACKEND = Path(__file__).resolve().parents[2]
CLASSES = list(DISHES)
DOME, SLAB = np.linspace(0, 1, 7)[:, None], np.array([[0], [1]])
LISTS = ["classes.txt", "labels.txt", "train.txt", "test.txt", "train.json", "test.json"]
ABOUT = """\
These pictures are drawn by NutriLearn's own code. They are not photographs, and a model trained on
them knows nothing about real food: they show that the whole training job works, with no download.
The folder has Food-101's layout. It is drawn again when one of its files is missing or changed, so
keep your own pictures elsewhere.

format {}, seed {}, images per class {}, of which test {}
"""

Array = NDArray[Any]
logger = logging.getLogger(__name__)


@lru_cache
def outline(count: int, corners: float) -> tuple[Array, Array, Array]:
    """Return x and y of an ellipse (2 corners) to a square (8), and a wave around it."""
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
    x, y = (np.sign(v) * np.abs(v) ** (2 / corners) for v in (np.cos(turn), np.sin(turn)))
    return x, y, np.cos(3 * turn + 1)


class Canvas:
    """A picture in the making, lit from one side; `p` is a place x + yj and `r` a radius, in px."""

    def __init__(self, image: Image.Image, rng: np.random.Generator) -> None:
        self.image, self.rng, self.floor, self.color = image, rng, "", ""
        self.ink, self.shadow = ImageDraw.Draw(image), ImageDraw.Draw(image, "RGBA")
        self.sun = rect(rng.uniform(0.3, 0.9), rng.uniform(-2.6, -0.5))  # toward it, longer if low

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def blob(self, blob: Blob, p: complex, r: float, angle: float) -> None:
        """Paint the shadow of a blob, then the blob, lighter toward the sun."""
        x, y, wave = outline(12 if r < 12 else 40, blob.corners)
        uneven = 1 + self.rng.normal(0, 0.02) * wave if blob.corners < 4 else 1
        shape = rect(r, angle) * uneven * (x * (1 - blob.taper * y) + 1j * blob.aspect * y)
        rise = blob.rise * r
        if rise > 3:
            shadow = p + shape - 1.3 * rise * self.sun
            self.shadow.polygon(shadow.view(float).tolist(), (0, 0, 0, 70))
        color = self.floor if self.color == "floor" else self.color
        tone = np.array(ImageColor.getrgb(color)) * self.rng.normal(1, 0.07)
        dome = blob.corners < 4 and not 0 <= blob.rise <= 0.2
        t = DOME if dome and abs(rise) > 4 else SLAB  # how far up
        parts = p + shape * (1 - 0.85 * dome * t) + 0.6 * rise * self.sun * t
        fills = (tone * (0.78 + 0.34 * t)).clip(0, 255).astype(int)
        for part, fill in zip(parts.view(float).tolist(), fills.tolist(), strict=True):
            self.ink.polygon(part, tuple(fill))

    def piece(self, name: str, p: complex, r: float, angle: float) -> None:
        for blob in PIECES[name]:
            self.color = self.pick(blob.colors.split()) if blob.colors else self.color
            self.blob(blob, p + blob.at * rect(r, angle), r * blob.size, angle)

    def row(self, row: Row, p: complex, r: float, upright: bool) -> None:
        pieces = self.rng.choice(row.pieces.split(), row.kinds, replace=False).tolist()
        count = int(self.rng.integers(row.fewest, row.most + 1))
        k = self.rng.permutation(count) + 0.5
        if upright:  # side by side
            spots = row.reach * (2 * k / count - 1)
            angles = self.rng.normal(0, 0.12 if count > 4 else 0.03, count)
        else:  # evenly over a disc, as seeds in a sunflower
            angles = self.rng.uniform(0, 2 * np.pi, count)
            places = np.sqrt(k / count) * np.exp(1j * (2.4 * k + angles[:1])) * (count > 1)
            spots = row.reach * places + self.rng.normal(0, 0.04, (count, 2)) @ [1, 1j]
        for spot, angle in zip(spots, angles, strict=True):
            size = r * row.size * (self.rng.uniform(0.8, 1.2) if count > 1 else 1)
            self.piece(self.pick(pieces), p + r * spot, size, angle)

    def draw(self, view: View, p: complex, r: float) -> None:
        if not view.upright:
            self.row(CLUTTER, p, r, False)
        angle = 0 if view.upright else self.rng.uniform(-0.5, 0.5)
        self.piece(self.pick(view.vessels.split()), p, r, angle)
        red, green, blue = self.image.getpixel((int(p.real), int(p.imag)))  # type: ignore[misc]
        self.floor = f"rgb({red},{green},{blue})"
        for row in view.rows:
            self.row(row, p, r, view.upright)


def noise(rng: np.random.Generator, shape: tuple[int, int], rows: int, columns: int) -> Array:
    grid = Image.fromarray(rng.standard_normal((rows, columns), np.float32))
    return np.asarray(grid.resize(shape[::-1], Image.Resampling.BILINEAR))


def table(rng: np.random.Generator, shape: tuple[int, int]) -> Image.Image:
    """Planks, cloth, marble or stone."""
    one, two = (
        np.array(ImageColor.getrgb(str(c)), np.float32) for c in rng.choice(TABLES.split(), 2)
    )
    turn, kind = rng.uniform(0, np.pi), rng.integers(4)
    y, x = np.mgrid[: np.float32(shape[0]), : np.float32(shape[1])]
    cos, sin, pitch = math.cos(turn), math.sin(turn), rng.uniform(18, 60)
    along, across = x * cos + y * sin, y * cos - x * sin
    blend, gain = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    if kind == 0:
        gain += rng.normal(0, 0.15, 99)[(y // pitch).astype(int)] - 0.4 * (y % pitch < 2)
        gain += 0.08 * noise(rng, shape, shape[0] // 2, 6)
    elif kind == 1:
        blend += 0.5 * (along // pitch % 2) + rng.choice([0, 0.5]) * (across // pitch % 2)
    elif kind == 2:
        gain -= 0.25 * np.exp(-8 * np.abs(noise(rng, shape, 3, 4) + noise(rng, shape, 9, 12) / 2))
    else:
        blend += np.clip(noise(rng, shape, shape[0] // 5, shape[1] // 5) - 0.5, 0, 0.5)
    pixels = (one + (two - one) * blend[..., None]) * gain[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def photograph(image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Reduce, blur and expose."""
    blur = ImageFilter.BoxBlur(float(rng.choice([0, 0, 0.6, 1, 1.8, 3])))
    image = image.resize(size, Image.Resampling.BILINEAR).filter(blur)
    y, x = np.ogrid[-1 : 1 : size[1] * 1j, -1 : 1 : size[0] * 1j]
    light = 1 - rng.uniform(0, 0.2) * (x**2 + y**2) + rng.uniform(-0.2, 0.2) * x
    white, contrast = np.exp(rng.normal(0.05, [0.09, 0.02, 0.13])), rng.uniform(0.85, 1.15)
    gain = (light[..., None] * white * rng.uniform(0.75, 1.2)).astype(np.float32)
    scene = (np.asarray(image) * gain - 120) * contrast
    scene += 122 + rng.standard_normal((size[1], size[0], 1), np.float32) * rng.uniform(0, 9)
    return Image.fromarray(scene.clip(0, 255).astype(np.uint8))


def draw_dish(name: str, seed: int, index: int) -> tuple[Image.Image, int]:
    """Draw one picture; returns it and its JPEG quality, the same for the same arguments."""
    rng = np.random.default_rng([seed, CLASSES.index(name), index])
    side, aspect = rng.choice([512, 448, 384, 384, 352, 320]), rng.choice([1, 0.75, 0.75, 0.6])
    size = int(side), int(side * aspect)
    size = size if rng.random() < 0.65 else size[::-1]
    view = DISHES[name][int(rng.integers(len(DISHES[name])))]
    wide, tall = size[0], int(size[1] * (1 if view.upright else rng.uniform(1, 1.5)))
    scene = table(rng, (tall, wide))
    if view.upright:  # a wall out of focus, above the edge of the table
        wall = table(rng, (tall // 6, wide // 6))
        scene.paste(wall.resize((wide, int(tall * rng.uniform(0.35, 0.68)))))
    scene = scene.resize((2 * wide, 2 * tall), Image.Resampling.NEAREST)  # for smooth edges
    r = min(wide, tall) * rng.uniform(0.4, 0.9) * (0.8 if view.upright else 1)
    p = complex(wide * rng.uniform(0.66, 1.34), tall * rng.uniform(0.72, 1.28))
    Canvas(scene, rng).draw(view, p + 0.8j * r * view.upright, r)
    return photograph(scene, size, rng), int(rng.integers(35, 96))


def draw_share(images: Path, seed: int, numbers: range) -> None:
    """Draw the pictures of these numbers, of every class, into existing folders."""
    for number in numbers:
        for name in CLASSES:
            picture, quality = draw_dish(name, seed, number)
            picture.save(images / name / f"{1000 + number}.jpg", quality=quality)


def _draw_pictures(images: Path, seed: int, images_per_class: int) -> None:
    """Draw in several processes, which import this module alone.

    Those of a process pool would first import the training script, with PyTorch and all.
    """
    workers = min(os.cpu_count() or 1, 8) if len(CLASSES) * images_per_class >= SHARE_FROM else 1
    path = os.pathsep.join(filter(None, [str(BACKEND), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", __name__, str(images.resolve()), str(seed)]
    environment = {**os.environ, "PYTHONPATH": path}
    with contextlib.ExitStack() as stack:
        helpers = []
        for first in range(1, workers):
            share = [*command, str(first), str(images_per_class), str(workers)]
            helper = subprocess.Popen(  # -m looks into the current folder first
                share, stderr=subprocess.PIPE, text=True, env=environment, cwd=BACKEND
            )
            helpers.append(stack.enter_context(helper))
            stack.callback(helper.kill)
        draw_share(images, seed, range(0, images_per_class, workers))
        for helper in helpers:
            _, errors = helper.communicate()
            if helper.returncode:
                reason = (errors.splitlines() or [f"exit code {helper.returncode}"])[-1]
                raise OSError(f"the sample could not be drawn into {images}: {reason}")


def _draw_set(folder: Path, seed: int, numbers: dict[str, range]) -> None:
    for name in CLASSES:
        (folder / "images" / name).mkdir(parents=True)
    _draw_pictures(folder / "images", seed, numbers["test"].stop)
    (folder / "meta").mkdir()
    lines = {"classes": CLASSES, "labels": [n.replace("_", " ").capitalize() for n in CLASSES]}
    for split, chosen in numbers.items():
        ids = {name: [f"{name}/{1000 + number}" for number in chosen] for name in CLASSES}
        (folder / "meta" / f"{split}.json").write_text(json.dumps(ids), encoding="utf-8")
        lines[split] = [i for of_class in ids.values() for i in of_class]
    for stem, items in lines.items():
        (folder / "meta" / f"{stem}.txt").write_text("\n".join(items) + "\n", encoding="utf-8")


def _checksum(folder: Path, images_per_class: int) -> str:
    """Return the SHA-256 of all that belongs to the set, so that damage shows."""
    digest = hashlib.sha256()
    for name in LISTS:
        digest.update((folder / "meta" / name).read_bytes())
    for name in CLASSES:
        for number in range(images_per_class):
            digest.update((folder / "images" / name / f"{1000 + number}.jpg").read_bytes())
    return f"sha256 {digest.hexdigest()}\n"


def _is_complete(folder: Path, about: str, images_per_class: int) -> bool:
    try:
        text = (folder / "DRAWN.txt").read_text(encoding="utf-8", errors="replace")
        return text == about + _checksum(folder, images_per_class)
    except FileNotFoundError:
        return False


def draw_sample(
    root: Path, seed: int = 42, images_per_class: int = 60, test_per_class: int = 15
) -> Path:
    """Draw the set under `root` unless it is there already, and return `root/food-101`.

    The folder appears whole or not at all. Raises ValueError for counts that leave a split empty,
    and FileExistsError when `root/food-101` holds something that was not drawn here, such as
    Food-101 itself: that is never replaced.
    """
    num_train = images_per_class - test_per_class
    if test_per_class < 1 or num_train < 1:
        raise ValueError(
            f"test_per_class is {test_per_class} of {images_per_class} images per class: "
            "choose at least 1, and leave at least 1 to train on."
        )
    target = root / "food-101"
    if target.exists() and any(target.iterdir()) and not (target / "DRAWN.txt").exists():
        raise FileExistsError(
            f"{target} holds pictures that --sample did not draw, so it is left alone: "
            "choose another --data_dir for the sample set."
        )
    about = ABOUT.format(FORMAT, seed, images_per_class, test_per_class)
    if not _is_complete(target, about, images_per_class):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".food-101-", dir=root) as scratch:
            new, old = Path(scratch) / "new", Path(scratch) / "old"
            splits = {"train": range(num_train), "test": range(num_train, images_per_class)}
            _draw_set(new, seed, splits)
            about += _checksum(new, images_per_class)
            (new / "DRAWN.txt").write_text(about, encoding="utf-8")
            if target.exists():
                target.rename(old)
            new.rename(target)
    total = images_per_class * len(CLASSES)
    logger.info("sample: %d pictures in %s, drawn by this project, not photographs", total, target)
    return target


if __name__ == "__main__":
    folder, seed, *numbers = sys.argv[1:]
    draw_share(Path(folder), int(seed), range(*map(int, numbers)))
