"""Do start-up and memory stay small when there are many images?

    python benchmarks/scale.py --images 1010 101000

For each number, a Food-101 of that size (101 classes, every picture one of 500 drawn ones under
another name) is made in a temporary folder. A fresh process then does what training does, from
importing torch to the first batch of features, and continues for 50 batches.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import alternating
from training_speed import OurLoop

import train_model
from training.config import TrainingConfig
from training.sample.generate import draw_sample

CLASSES = 101
BATCHES = 50


def make_tree(folder: Path, num_images: int, drawn: list[Path]) -> None:
    """Write Food-101's layout, three quarters to train on; the pictures are hard links."""
    root = folder / "food-101"
    lists: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    each = -(-num_images // CLASSES)
    for number in range(CLASSES):
        name = f"dish_{number:03}"
        (root / "images" / name).mkdir(parents=True)
        for i in range(each):
            picture = drawn[(number * each + i) % len(drawn)]
            os.link(picture, root / "images" / name / f"{i}.jpg")
            part = "train" if i < each * 3 // 4 else "test"
            lists[part].setdefault(name, []).append(f"{name}/{i}")
    (root / "meta").mkdir()
    (root / "meta" / "classes.txt").write_text("\n".join(lists["train"]), encoding="utf-8")
    for part, names in lists.items():
        (root / "meta" / f"{part}.json").write_text(json.dumps(names), encoding="utf-8")


def start(data_dir: Path, folder: Path, began: float) -> None:
    """Print the seconds from `began` to the first batch, and this process's peak memory in MB."""
    config = TrainingConfig(data_dir=data_dir, weights="none", checkpoint_dir=folder)
    data = train_model.load_data(config)
    listed = time.time() - began
    source = OurLoop(config, data, folder).train_batches
    batches = source.epoch(0)
    next(batches)
    first = time.time() - began
    for _ in zip(range(BATCHES), batches, strict=False):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{len(data.train):>10,} {listed:14.1f} {first:14.1f} {peak:14.0f}", flush=True)
    source.close()


def main() -> None:
    parser = alternating.make_parser(__doc__)
    sizes = [1010, 101_000]
    parser.add_argument("--images", type=int, nargs="+", default=sizes, help="(1010 101000)")
    parser.add_argument("--start", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        data_dir, folder, began = options.start
        start(Path(data_dir), Path(folder), float(began))
        return
    print(alternating.machine())
    print(f"{'images':>10} {'listed (s)':>14} {'1st batch (s)':>14} {'peak (MB)':>14}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        drawn = sorted(draw_sample(Path(folder) / "drawn").rglob("*.jpg"))[:500]
        for number in options.images:
            place = Path(folder) / str(number)
            make_tree(place, number, drawn)
            again = [sys.executable, __file__, "--start", str(place), str(place / "run")]
            subprocess.run([*again, str(time.time())], check=True)


if __name__ == "__main__":
    main()
