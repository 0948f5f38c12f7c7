"""Kill a training run again and again, and compare the result with a run that was left alone.

    python -m tests.torture.kill_test --kills 50

Runs are trained one after the other. Each is killed with SIGKILL up to five times, at seeded
random moments: in the middle of writing a checkpoint, the record or the model's files, in a
training step, in validation, or at any time. Each time `--resume auto` continues it, until it ends.
Its weights (SHA-256), metric history and learning rates must be those of the run that was left
alone. A run is short (3 classes of drawn colors, a small network, 4 epochs) and saves every 0.3 s,
not every 5 minutes. Linux and macOS; the exit code is 1 if anything was lost.

With these flags crops grow, and on a CPU with VNNI the frozen layers compute in INT8:

    --flags "--model_name mobilenet_v2 --weights FILE --freeze_layers 10 --batch_size 1 --epochs 8"
"""

import argparse
import collections
import random
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "backend"))

from tests.support.runs import Outcome, Trap, arguments, draw_photos, outcome, start

KILLS_PER_RUN = 5
LONGEST_SECONDS = 600  # of one process; longer means that it hangs


@dataclass
class Tally:
    """The kills of one kind, and the seconds of work that each cost."""

    kills: int = 0
    survived: int = 0
    lost_seconds: list[float] = field(default_factory=list)


@dataclass
class Bench:
    photos: Path
    folder: Path
    rng: random.Random
    flags: list[str]
    expected: Outcome | None = None
    seconds: float = 0.0  # of the undisturbed run
    added: list[float] = field(default_factory=list)  # seconds a kill, all its consequences
    tallies: dict[str, Tally] = field(default_factory=lambda: collections.defaultdict(Tally))

    def undisturbed(self) -> None:
        folder = self.folder / "undisturbed"
        folder.mkdir(parents=True)
        start(["--help"], folder / "help.txt").join()  # all other processes are forked from it
        began = time.monotonic()
        process = start(arguments(self.photos, folder, *self.flags), folder / "log.txt")
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
        argv = arguments(self.photos, folder, *self.flags, "--resume", "auto")
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
    parser.add_argument("--flags", default="", help="more of every run, in one string")
    parser.add_argument("--keep", type=Path, help="folder for the runs (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nutrilearn-kill-test-") as temporary:
        folder = options.keep or Path(temporary)
        photos, rng = draw_photos(folder / "photos"), random.Random(options.seed)
        bench = Bench(photos, folder, rng, shlex.split(options.flags))
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
