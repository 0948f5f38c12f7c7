"""Do memory, minutes and the report stay reasonable with many classes, or very uneven ones?

    python benchmarks/uneven_sets.py

Each row is a whole run of one epoch, in a process of its own, on class folders made for it from the
drawn plates under other names, so that what is learned means nothing. Its peak memory is that of
the largest process; the report is the page, with its pictures in it.
"""

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import alternating
import numpy as np

from training.sample.generate import draw_sample

SCRIPT = Path(__file__).resolve().parents[1] / "backend" / "train_model.py"
# Photos in each class: from, to, classes; in equal ratios from the smallest to the largest.
SETS = {
    "10 classes of 3 to 2,000": (3, 2000, 10),
    "101 classes of 3 to 200": (3, 200, 101),
    "500 classes of 3 to 30": (3, 30, 500),
    "1,000 classes of 6": (6, 6, 1000),
}


def make_folders(folder: Path, sizes: list[int], pictures: list[Path]) -> None:
    """Fill a folder for each class with hard links to the pictures, in turn."""
    endless: Iterator[Path] = (pictures[i % len(pictures)] for i in range(sum(sizes)))
    for number, size in enumerate(sizes):
        place = folder / f"dish_{number:04}"
        place.mkdir(parents=True)
        for i in range(size):
            os.link(next(endless), place / f"{i}.jpg")


def run(folder: Path, arguments: list[str]) -> tuple[float, float]:
    """Train and release in a process of its own; return its seconds and its peak memory in MB."""
    command = [sys.executable, __file__, "--run", sys.executable, str(SCRIPT), *arguments]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        began = time.time()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
    if done.returncode:
        raise SystemExit((folder / "log.txt").read_text(encoding="utf-8"))
    return time.time() - began, float(done.stdout.splitlines()[-1])


def row(name: str, sizes: list[int], pictures: list[Path], folder: Path) -> str:
    make_folders(folder / "photos", sizes, pictures)
    seconds, memory = run(
        folder,
        [
            f"--data_dir={folder / 'photos'}",
            f"--output_dir={folder / 'models'}",
            f"--checkpoint_dir={folder / 'runs'}",
            *("--epochs=1", "--weights=none", "--no_mlflow"),
        ],
    )
    log = (folder / "log.txt").read_text(encoding="utf-8")
    released = float(re.findall(r"released in ([\d.]+) s", log)[0])
    page = (folder / "models" / "food_model_v1" / "report.html").stat().st_size / 1e6
    cells = f"{sum(sizes):,} | {seconds - released:.0f} | {released:.0f} | {memory:.0f}"
    return f"{name} | {cells} | {page:.1f}"


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        done = subprocess.run(sys.argv[2:], stdout=sys.stderr, check=False)
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
        raise SystemExit(done.returncode)
    parser = alternating.make_parser(__doc__)
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=SETS, help="(all)")
    options = parser.parse_args()
    print(alternating.machine())
    print("| set | photos | start and training (s) | release (s) | peak (MB) | report (MB) |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = sorted(draw_sample(folder / "drawn").rglob("*.jpg"))
        for number, chosen in enumerate(options.sets):
            fewest, most, classes = SETS[chosen]
            sizes = [round(size) for size in np.geomspace(fewest, most, classes)]
            print(f"| {row(chosen, sizes, pictures, folder / str(number))} |", flush=True)


if __name__ == "__main__":
    main()
