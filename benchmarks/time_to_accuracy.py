"""How long until this share of other photos is classified correctly, against other ways to train?

    python benchmarks/time_to_accuracy.py --accuracy 0.9             on drawn plates
    python benchmarks/time_to_accuracy.py --accuracy 0.7 0.76 \\
        --data_dir FOLDER --score OTHER --weights FILE --seeds 42 1

Four sides train the same network on the same photos: the usual loop (see training_speed.py), ours,
timm's loop and fastai's fine_tune (see epochs_of_side.py). Each has a process of its own and the
whole machine while it trains: they take turns, an epoch each, in another order each time. The clock
runs from an imported library to the end of an epoch, our own validation included, which the others
lack. Scoring is not timed and the same for all: fp32, each at its own size of test pictures, ours
with the averaged weights, on OTHER (class folders) or, without it, on the test images.

The tables show seconds, and how many times ours they are; "-" is not reached.
"""

import argparse
import importlib.util
import math
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import alternating
import numpy as np
import training_speed
from epochs_of_side import SIDES, add_flags


class Epoch(NamedTuple):
    """seconds: since the start. accuracy: top-1 of the photos that are scored."""

    seconds: float
    accuracy: float


Course = list[Epoch]
Row = dict[str, float]  # by the names of the sides


class Side:
    """One way to train, in its process, with its clock."""

    def __init__(self, name: str, folder: Path, flags: list[str]) -> None:
        self.name, self.seconds = name, 0.0
        self.child = training_speed.Child("epochs_of_side.py", name, folder, *flags)
        self.course: Course = []

    def epoch(self) -> None:
        began = time.perf_counter()
        self.child.ask("epoch")
        self.seconds += time.perf_counter() - began
        self.course.append(Epoch(self.seconds, float(self.child.answer())))


def compare(names: list[str], seed: int, options: argparse.Namespace) -> dict[str, Course]:
    """Train all sides, an epoch each in turn."""
    flags = [f"--seed={seed}", f"--epochs={options.epochs}", f"--data_dir={options.data_dir}"]
    flags += [f"--weights={options.weights}", f"--model_name={options.model_name}"]
    flags += [f"--score={options.score}"] if options.score else []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sides = [Side(name, Path(folder, name), flags) for name in names]
        for side in sides:
            stack.enter_context(closing(side.child))
            side.child.answer()  # ready
        for epoch in range(1, options.epochs + 1):
            for side in sides if epoch % 2 else reversed(sides):
                side.epoch()
                seconds, accuracy = side.course[-1]
                print(
                    f"seed {seed}  {side.name:<6} epoch {epoch:>2}  {seconds:7.1f} s  "
                    f"top-1 {accuracy:.3f}",
                    flush=True,
                )
        return {side.name: side.course for side in sides}


def seconds_to(course: Course, accuracy: float) -> float:
    return next((epoch.seconds for epoch in course if epoch.accuracy >= accuracy), math.inf)


def best(course: Course) -> float:
    return max(epoch.accuracy for epoch in course)


def seconds_table(courses: dict[str, Course], accuracies: list[float]) -> dict[str, Row]:
    """Tabulate the seconds of each side to each accuracy, and to the best of each other side."""
    targets = {f"{accuracy:g}": accuracy for accuracy in accuracies}
    targets |= {f"best of {name}": best(courses[name]) for name in courses if name != "ours"}
    return {
        target: {name: seconds_to(course, accuracy) for name, course in courses.items()}
        for target, accuracy in targets.items()
    }


def ratios(row: Row) -> Row:
    """Divide by our seconds: 0 where only we do not arrive, not a number where nobody does."""
    with np.errstate(invalid="ignore"):
        return {name: float(np.divide(seconds, row["ours"])) for name, seconds in row.items()}


def medians(rows: list[Row]) -> Row:
    return {name: float(np.median([row[name] for row in rows])) for name in rows[0]}


def median_table(tables: list[dict[str, Row]]) -> dict[str, Row]:
    return {target: medians([table[target] for table in tables]) for target in tables[0]}


def shown(number: float, digits: int) -> str:
    return f"{number:.{digits}f}" if math.isfinite(number) else "-"


def report(title: str, accuracies: Row, seconds: dict[str, Row], times: dict[str, Row]) -> None:
    print(f"\n{title:<18}" + "".join(f"{name:>18}" for name in accuracies))
    print(f"{'best top-1':<18}" + "".join(f"{shown(top1, 3):>18}" for top1 in accuracies.values()))
    for target, row in seconds.items():
        cells = [f"{shown(row[name], 1)} s {shown(times[target][name], 1):>5} x" for name in row]
        print(f"{target:<18}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def report_all(courses: dict[int, dict[str, Course]], accuracies: list[float]) -> None:
    """Print a table for each seed, and one of their medians."""
    bests = [{name: best(course) for name, course in sides.items()} for sides in courses.values()]
    seconds = [seconds_table(sides, accuracies) for sides in courses.values()]
    times = [{target: ratios(row) for target, row in table.items()} for table in seconds]
    for number, seed in enumerate(courses):
        report(f"seed {seed}", bests[number], seconds[number], times[number])
    report("medians", medians(bests), median_table(seconds), median_table(times))


def main() -> None:
    parser = training_speed.make_parser(__doc__)
    add_flags(parser)
    parser.add_argument(
        "--accuracy", type=float, nargs="+", required=True, help="to reach, 0 to 1, several"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="(42)")
    options = parser.parse_args()
    print(alternating.machine())
    names = list(SIDES)
    if importlib.util.find_spec("fastai") is None:
        names.remove("fastai")
        print("fastai is left out, it is not installed: pip install fastai")
    with tempfile.TemporaryDirectory() as folder:  # the plates are drawn before the sides start
        options.data_dir = training_speed.config_from(options, Path(folder)).data_dir
    report_all({seed: compare(names, seed, options) for seed in options.seeds}, options.accuracy)


if __name__ == "__main__":
    main()
