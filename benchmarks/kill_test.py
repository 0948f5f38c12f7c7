"""Kill a training run again and again, and compare what comes out with a run that was left alone.

    python benchmarks/kill_test.py --kills 50

Runs are trained one after the other. Each is killed with SIGKILL up to five times, at seeded
random moments: in the middle of writing a checkpoint, the record or the model's files, in a
training step, in validation, or at any time. Each time `--resume auto` takes it up, until it ends.
Its weights (SHA-256), metric history and learning rates must be those of the run that was left
alone. A run is short (3 classes of drawn colours, MobileNetV2, 4 epochs) and saves every 0.3 s, not
every 5 minutes. Linux and macOS; exit code 1 if anything was lost.
"""

import argparse
import collections
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
BACKEND = REPOSITORY / "backend"
COLOURS = {"green": (60, 170, 60), "red": (190, 60, 60), "sky": (70, 90, 200)}
EXACT = ("epoch", "train_loss", "train_acc", "val_loss", "val_acc", "learning_rate")
KILLS_PER_RUN = 5
LONGEST_SECONDS = 600  # of one process; longer means that it hangs


def draw_photos(folder: Path, per_class: int = 14, noise: float = 60, seed: int = 0) -> Path:
    """Class folders of noisy coloured JPEGs, 64 pixels wide."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = np.array(colour) + rng.normal(0, noise, (64, 64, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / name / f"{number:02d}.jpg", quality=85)
    return folder


def arguments(photos: Path, folder: Path, *more: str) -> list[str]:
    """The flags of a short run whose files all go into one folder."""
    small = ("--weights", "none", "--freeze_layers", "10", "--batch_size", "8", "--epochs", "4")
    plain = ("--device", "cpu", "--num_workers", "0", "--no_mlflow")
    places = ("--data_dir", photos, "--output_dir", folder / "models")
    return [*map(str, places), "--checkpoint_dir", str(folder / "runs"), *small, *plain, *more]


# One process ----------------------------------------------------------------------------------


@dataclass
class Trap:
    """Counts the moments of one kind that a process passes, and kills it at one of them.

    signals: what to send to itself then, in this order.
    """

    kind: str
    number: int
    signals: tuple[int, ...] = (signal.SIGKILL,)
    passed: int = 0

    def __call__(self, kind: str) -> None:
        if kind == self.kind:
            self.passed += 1
            if self.passed == self.number:
                for number in self.signals:
                    os.kill(os.getpid(), number)


class HalfWritten:
    """A file in which each write has a moment in its middle."""

    def __init__(self, file: Any, trap: Trap) -> None:
        self.file, self.trap = file, trap

    def write(self, data: bytes) -> None:
        half = len(data) // 2
        self.file.write(data[:half])
        self.file.flush()
        self.trap(kind_of(self.file.name))
        self.file.write(data[half:])

    def __enter__(self) -> "HalfWritten":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def kind_of(file: object) -> str:
    """checkpoint, record or release, by the name of a file or the number of an open one."""
    if isinstance(file, int):
        file = os.readlink(f"/proc/self/fd/{file}") if Path("/proc/self/fd").exists() else ""
    name = Path(os.fsdecode(file)).name  # type: ignore[arg-type]
    if "checkpoint-" in name:
        return "checkpoint"
    return "record" if name == "metrics.jsonl" else "release"


def set_trap(trap: Trap) -> None:
    """Let the moments of this process pass through the trap."""
    import train_model
    from training import step
    from training.compute.features import FeatureStore

    real = {name: getattr(os, name) for name in ("replace", "fsync", "unlink", "fdopen")}

    def replace(source: Any, target: Any) -> None:
        trap(kind_of(target))
        real["replace"](source, target)
        trap(kind_of(target))

    def fsync(number: int) -> None:
        trap(kind_of(number))
        real["fsync"](number)

    def unlink(path: Any, **options: Any) -> None:
        trap(kind_of(path))
        real["unlink"](path, **options)

    def fdopen(number: int, mode: str) -> HalfWritten:
        return HalfWritten(real["fdopen"](number, mode), trap)

    os.replace, os.fsync, os.unlink, os.fdopen = replace, fsync, unlink, fdopen  # type: ignore[assignment]
    for owner, name, kind in [
        (step, "add_gradients", "train"),
        (train_model, "_logits", "validate"),
        (FeatureStore, "put", "validate"),
        (train_model, "log_epoch", "epoch end"),
    ]:
        setattr(owner, name, _passing(getattr(owner, name), trap, kind))


def _passing(function: Any, trap: Trap, kind: str) -> Any:
    def passing(*values: Any, **named: Any) -> Any:
        result = function(*values, **named)
        trap(kind)
        return result

    return passing


def live(
    argv: list[str],
    log: Path,
    trap: Trap | None,
    save_seconds: float,
    prepare: Callable[[], object],
) -> None:
    """The body of one process: the command line, its output in a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    import train_model
    from training.run import resume as resuming

    torch.set_num_threads(1)
    resuming.CHECKPOINT_SECONDS = save_seconds  # type: ignore[assignment]
    prepare()
    if trap:
        set_trap(trap)
    code = train_model.main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def start(
    argv: list[str],
    log: Path,
    trap: Trap | None = None,
    save_seconds: float = 0.3,
    prepare: Callable[[], object] = bool,
) -> BaseProcess:
    """Run the command line in a new process, forked from one that has imported everything.

    prepare: called in the new process first; must be found by its name there.
    """
    os.environ.setdefault("PYTHONPATH", os.pathsep.join([str(BACKEND), str(REPOSITORY)]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_model", "training.release.release"])
    process = context.Process(target=live, args=(argv, log, trap, save_seconds, prepare))
    process.start()
    return process


# The whole test -------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a run left: the weights' SHA-256 and the exact numbers of each epoch."""

    weights: str
    history: list[tuple[float, ...]]


def outcome(folder: Path) -> Outcome:
    (weights,) = (folder / "models").glob("food_model_v?.pth")
    # A run that is killed before its first checkpoint leaves an empty folder and begins anew.
    (finished,) = (folder / "runs").glob("*/finished.json")
    lines = (finished.parent / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    history = [tuple(e[name] for name in EXACT) for e in events if e["event"] == "epoch"]
    return Outcome(hashlib.sha256(weights.read_bytes()).hexdigest(), history)


@dataclass
class Tally:
    """What was seen of the kills of one kind; seconds of work that had to be done again."""

    kills: int = 0
    survived: int = 0
    lost_seconds: list[float] = field(default_factory=list)


@dataclass
class Bench:
    photos: Path
    folder: Path
    rng: random.Random
    expected: Outcome | None = None
    seconds: float = 0.0  # of the undisturbed run
    added: list[float] = field(default_factory=list)  # seconds a kill, all its consequences
    tallies: dict[str, Tally] = field(default_factory=lambda: collections.defaultdict(Tally))

    def undisturbed(self) -> None:
        folder = self.folder / "undisturbed"
        folder.mkdir(parents=True)
        start(["--help"], folder / "help.txt").join()  # all other processes are forked from it
        began = time.monotonic()
        process = start(arguments(self.photos, folder), folder / "log.txt")
        process.join(LONGEST_SECONDS)
        self.seconds = time.monotonic() - began
        if process.exitcode != 0:
            raise SystemExit(f"the undisturbed run failed:\n{(folder / 'log.txt').read_text()}")
        self.expected = outcome(folder)

    def run(self, number: int, kills: int) -> int:
        """Kill one run up to `kills` times and let it end; returns how often it was killed."""
        began, killed = time.monotonic(), []
        folder = self.folder / f"run-{number:03d}"
        folder.mkdir(parents=True)
        argv = arguments(self.photos, folder, "--resume", "auto")
        while True:
            kind = self.rng.choice(KINDS) if len(killed) < kills else None
            # The square: a run that was resumed late has few moments left.
            trap = Trap(kind, 1 + int(self.rng.random() ** 2 * MOMENTS[kind])) if kind else None
            process = start(argv, folder / "log.txt", trap)
            patience = self.rng.uniform(0.2, self.seconds) if kind == "any time" else None
            process.join(patience or LONGEST_SECONDS)
            if process.exitcode is None:
                process.kill()
                process.join()
            if process.exitcode != -signal.SIGKILL:
                break
            assert kind is not None
            killed.append(kind)
            self.tallies[kind].lost_seconds.append(_since_last_save(folder, self.seconds))
            if any(folder.glob("runs/*/finished.json")):
                break  # there is nothing left to resume
        ok = process.exitcode in (0, -signal.SIGKILL) and outcome(folder) == self.expected
        for kind in killed:
            self.tallies[kind].kills += 1
            self.tallies[kind].survived += ok
        if killed:
            self.added.append((time.monotonic() - began - self.seconds) / len(killed))
        print(
            f"run {number}: killed in {', '.join(killed) or 'nothing'}: {VERDICT[ok]}", flush=True
        )
        if ok:
            shutil.rmtree(folder)
        return len(killed)


VERDICT = {True: "the same", False: "LOST"}
# How many moments of each kind there are in a process, about; a run ends where one is not reached.
MOMENTS = {
    "checkpoint": 60,
    "train": 16,
    "validate": 5,
    "epoch end": 4,
    "record": 6,
    "release": 36,
    "any time": 1,
}
KINDS = [*MOMENTS, "checkpoint", "checkpoint", "train", "release", "release"]


def _since_last_save(folder: Path, at_most: float) -> float:
    """Seconds of work that the kill cost: since the last checkpoint, or since the start."""
    saves = [path.stat().st_mtime for path in folder.glob("runs/*/checkpoint-*.json")]
    started = [path.stat().st_mtime for path in folder.glob("runs/*/.in-use.lock")]
    return min(time.time() - max(saves or started or [time.time()]), at_most)


def table(bench: Bench) -> Iterator[str]:
    yield "killed in    kills  survived  lost seconds (median, longest)"
    for kind, tally in bench.tallies.items():
        lost = tally.lost_seconds
        yield (
            f"{kind:<12}{tally.kills:>6}{tally.survived:>10}"
            f"{statistics.median(lost):>10.1f}{max(lost):>8.1f}"
        )
    kills = sum(t.kills for t in bench.tallies.values())
    survived = sum(t.survived for t in bench.tallies.values())
    lost = [seconds for tally in bench.tallies.values() for seconds in tally.lost_seconds]
    yield f"{'all':<12}{kills:>6}{survived:>10}{statistics.median(lost):>10.1f}{max(lost):>8.1f}"
    yield (
        f"undisturbed run {bench.seconds:.1f} s; each kill added "
        f"{statistics.median(bench.added):.1f} s (median), start of the next process included"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="how often to kill (50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--keep", type=Path, help="folder for the runs (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nutrilearn-kill-test-") as temporary:
        folder = options.keep or Path(temporary)
        bench = Bench(draw_photos(folder / "photos"), folder, random.Random(options.seed))
        bench.undisturbed()
        print(f"undisturbed run: {bench.seconds:.1f} s")
        kills, number = 0, 0
        while kills < options.kills and number < 2 * options.kills:
            number += 1
            kills += bench.run(number, min(KILLS_PER_RUN, options.kills - kills))
        print("\n".join(table(bench)))
    return 0 if all(t.survived == t.kills for t in bench.tallies.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
