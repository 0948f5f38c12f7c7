"""What do photos cost to read as files, from a tar with an index, and from WebDataset shards?

    python benchmarks/shards.py --data_dir FOLDER --on EMPTY
    python benchmarks/shards.py --data_dir FOLDER --on EMPTY --before "umount DISK; mount DISK"

Only bytes are read, nothing is decoded. The photos are copied to --on, as files and as shards. The
command --before empties the caches of that disk, for reading it cold. WebDataset (`pip install
webdataset`) reads shard after shard and shuffles within a buffer; the others read in any order.
"""

import io
import os
import random
import statistics
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import alternating

SHARD, BUFFER = 500, 1000  # photos


def main() -> None:
    parser = alternating.make_parser(__doc__, rounds=5)
    parser.add_argument("--data_dir", type=Path, required=True, help="photos, in any folders")
    parser.add_argument("--on", type=Path, required=True, help="an empty folder to read from")
    parser.add_argument("--before", help="shell command that empties the caches, before each round")
    options = parser.parse_args()
    files, shards = copies(sorted(options.data_dir.rglob("*.jpg")), options.on)
    places = index_of(shards)
    ways = {
        "files in class folders": lambda: read_files(files),
        "tar with an index": lambda: read_places(places),
        "WebDataset": lambda: read_webdataset(shards),
    }
    print(alternating.machine())
    for way, seconds in measure(ways, options.rounds, options.before).items():
        each = sorted(1000 * s for s in seconds)
        spread = f"from {each[0]:.2f} to {each[-1]:.2f}"
        print(f"{way:25}{statistics.median(each):6.2f} ms a photo ({spread})")


def copies(photos: list[Path], folder: Path) -> tuple[list[Path], list[Path]]:
    """Copy the photos as files, and in shards in which they are mixed; return both, files mixed."""
    random.Random(0).shuffle(photos)
    files, shards = [], []
    for start in range(0, len(photos), SHARD):
        shards.append(folder / f"{start:06d}.tar")
        with tarfile.open(shards[-1], "w") as tar:
            for number, photo in enumerate(photos[start : start + SHARD], start):
                data = photo.read_bytes()
                files.append(folder / photo.parent.name / f"{number}.jpg")
                files[-1].parent.mkdir(exist_ok=True)
                files[-1].write_bytes(data)
                member = tarfile.TarInfo(f"{number}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    random.Random(1).shuffle(files)
    return files, shards


Place = tuple[Path, int, int]  # tar, offset, bytes


def index_of(shards: list[Path]) -> list[Place]:
    """List where the photos are in the shards, in any order."""
    places = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            places += [(shard, member.offset_data, member.size) for member in tar]
    random.Random(1).shuffle(places)
    return places


def read_files(files: list[Path]) -> int:
    return sum(bool(file.read_bytes()) for file in files)


def read_places(places: list[Place]) -> int:
    opened = {shard: os.open(shard, os.O_RDONLY) for shard, _, _ in places}
    count = sum(bool(os.pread(opened[shard], size, at)) for shard, at, size in places)
    for descriptor in opened.values():
        os.close(descriptor)
    return count


def read_webdataset(shards: list[Path]) -> int:
    import webdataset

    samples = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=len(shards))
    return sum(bool(sample["jpg"]) for sample in samples.shuffle(BUFFER))


def measure(
    ways: dict[str, Callable[[], int]], rounds: int, before: str | None
) -> dict[str, list[float]]:
    """Read everything in each way, in turn; return the seconds a photo of each round."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, read in ways.items():
            if before:
                subprocess.run(before, shell=True, check=True)
            began = time.perf_counter()
            count = read()
            seconds[way].append((time.perf_counter() - began) / count)
    return seconds


if __name__ == "__main__":
    main()
