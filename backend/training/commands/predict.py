"""Predictions of a released model: printed for single pictures, as a CSV for folders of them."""

import contextlib
import csv
import glob
import logging
import os
import time
import zlib
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from app.ml.predictor import FoodPredictor, Prediction
from app.ml.preprocessing import IMAGE_EXTENSIONS, ImageError
from training.data.folders import (
    NOT_A_FILE,
    Audit,
    is_folder,
    is_image,
    join_names,
    list_folder,
    os_reason,
    problem_with,
    skip_by_ending,
)
from training.data.loader import (
    MAX_WORKERS,
    chosen_num_workers,
    default_num_workers,
    eval_loader,
    num_cores,
)
from training.errors import DataError
from training.run.signals import Interrupted, StopRequest

BATCH_SIZE = 32
PREDICTIONS_CSV = Path("predictions.csv")  # in the current folder: photos may be read-only
FIRST_COLUMNS = "file,verdict,class_1,probability_1,"  # how a file of ours begins
CSV_ENCODING = "utf-8-sig"  # without the mark at its start Excel takes "crème" for another encoding
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # Excel evaluates cells that begin so
VERDICT_WORDS = {
    "confident": "confident",
    "unsure": "not sure",
    "not_food": "this does not look like a dish the model knows",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """One of `count` shares of the pictures, by its index from 0: as queues and clusters number."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def holds(self, name: str) -> bool:
        """Whether a picture of this name, relative to the folder that was asked for, is in it.

        By a checksum of the name: machines agree wherever they mount the folder, and a picture
        that comes or goes moves no other.
        """
        place = os.fsencode(name.replace(os.sep, "/"))
        return zlib.crc32(place) % self.count == self.index

    @property
    def table(self) -> Path:
        """Name the table: shares may be written to one folder."""
        return PREDICTIONS_CSV.with_stem(f"{PREDICTIONS_CSV.stem}-{self.index}-of-{self.count}")


def predict_paths(
    model: FoodPredictor,
    paths: Sequence[str],
    *,
    top_k: int,
    device: torch.device,
    num_workers: int | str,
    shard: Shard | None = None,
) -> int:
    """Predict pictures and folders of them; return the exit code.

    shard: predict this share only, to a table of its own. The exit code is 1 if a picture that was
    named, or every one that was found, cannot be read, and 128 + N after signal N.
    """
    top_k = min(top_k, len(model.classes))
    paths = [path for pattern in paths for path in expand(pattern)]
    if not (shard or any(map(os.path.isdir, paths))):
        return 1 if print_predictions(model, paths, top_k) else 0
    table = shard.table if shard else PREDICTIONS_CSV
    check_target(table)
    audit = Audit()
    images = find_images(paths, audit, shard)
    for line in audit.describe_skipped():
        logger.info("%s", line)
    batches = predictions(model, images, top_k, device, reader_processes(num_workers, device))
    try:
        with contextlib.closing(StopRequest()) as stop, stop.raising(), contextlib.closing(batches):
            unread = write_predictions(table, batches, len(images), top_k)
    except Interrupted as interrupted:
        logger.info("stopped by %s; %s holds the predictions so far", interrupted, table)
        return interrupted.exit_code
    all_failed = len(unread) == len(images) > 0  # a share of few pictures may be empty
    return 1 if all_failed or unread & set(paths) else 0


def expand(pattern: str) -> list[str]:
    """Return the files that a pattern stands for: cmd.exe expands neither *.jpg nor ~.

    Raises:
        DataError: there are none.
    """
    if os.path.lexists(pattern):
        return [pattern]
    path = os.path.expanduser(pattern)
    if not glob.has_magic(path):
        return [path]
    if matches := sorted(glob.glob(path)):
        return matches
    raise DataError(f"--predict {pattern}: no file matches")


def reader_processes(setting: int | str, device: torch.device) -> int:
    """Resolve "auto": beside a GPU reading is most of the work, so it gets half the cores."""
    if setting != "auto" or device.type == "cpu":
        return chosen_num_workers(setting, device)
    return max(default_num_workers(device), min(MAX_WORKERS, num_cores() // 2))


def print_predictions(model: FoodPredictor, paths: Sequence[str], top_k: int) -> list[str]:
    """Print what is on each picture, to be read by a person; return those that failed."""
    problems = {}
    for path in paths:
        try:
            prediction = model.predict(path, top_k)
        except ImageError as error:
            problems[path] = str(error)
            continue
        except OSError as error:
            problems[path] = f"cannot be opened ({error.strerror})"
            continue
        # backslashreplace: a file name may hold bytes that are not text
        print(os.fsencode(path).decode("utf-8", "backslashreplace"))  # noqa: T201
        for name, probability in prediction.top:
            bar = "#" * round(probability * 30)
            line = f"  {name.replace('_', ' '):<28}{probability:7.1%}  {bar}"
            print(line.rstrip())  # noqa: T201
        print(f"  {VERDICT_WORDS[prediction.verdict]}")  # noqa: T201
    for path, problem in problems.items():
        logger.error("%s: %s", path, problem)
    return list(problems)


def find_images(paths: Sequence[str], audit: Audit, shard: Shard | None = None) -> list[str]:
    """List files as named, and every picture in folders and their sub-folders, sorted by name.

    shard: list only its share of them.

    Raises:
        DataError: a folder without a picture.
    """
    found: dict[str, str] = {}  # path -> name in what was asked for
    for path in paths:
        images = list(_images_within(Path(path), audit)) if os.path.isdir(path) else [path]
        if not images:
            endings = ", ".join(f"*{ending}" for ending in IMAGE_EXTENSIONS)
            problem = f"{path} holds no picture; files named {endings} are read"
            raise DataError("; ".join([problem, *audit.describe_skipped()]))
        found |= {image: _name_within(path, image) for image in images}
    return [image for image, name in found.items() if shard is None or shard.holds(name)]


def _name_within(path: str, image: str) -> str:
    return os.path.basename(image) if image == path else os.path.relpath(image, path)


def _images_within(folder: Path, audit: Audit) -> Iterator[str]:
    try:
        entries = list_folder(folder)
    except OSError as error:
        audit.skip(folder, os_reason(error))
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _images_within(Path(entry.path), audit)
        elif is_folder(entry):
            audit.skip(entry.path, "a link to a folder")  # it may lead back up
        elif not is_image(entry):
            skip_by_ending(entry, audit)
        elif problem_with(entry) == NOT_A_FILE:  # reading a pipe would wait forever
            audit.skip(entry.path, NOT_A_FILE)
        else:  # whatever else is wrong is found when it is read
            yield entry.path


def predictions(
    model: FoodPredictor, images: Sequence[str], top_k: int, device: torch.device, num_workers: int
) -> Generator[list[tuple[str, Prediction | str]], None, None]:
    """Yield batches of images, in order, each with its prediction or the reason why it has none."""
    if not images:
        return
    # Workers read ahead while the network computes, which it does not for the first batch.
    num_workers = min(num_workers, -(-len(images) // BATCH_SIZE) - 1)
    config = model.record.preprocessing
    loader = eval_loader(tuple(images), config, BATCH_SIZE, num_workers, device)
    with contextlib.closing(loader):
        for batch in loader:
            found: dict[int, Prediction | str] = {
                sample.key.image: sample.problem or "" for sample in batch.problems
            }
            if len(batch.indices):
                predictions = model.predict_batch(batch.images, top_k)
                found |= zip(batch.indices.tolist(), predictions, strict=True)
            yield [(images[index], found[index]) for index in sorted(found)]


def check_target(path: Path) -> None:
    """Refuse to replace any file but one of predictions.

    Raises:
        DataError: it is something else.
    """
    if path.exists() and not (path.is_file() and _begins_as_predictions(path)):
        raise DataError(
            f"{path.absolute()} already exists and is not a list of predictions; rename it, or "
            "run the command in another folder"
        )


def _begins_as_predictions(path: Path) -> bool:
    with path.open(encoding=CSV_ENCODING, errors="replace") as file:
        return file.read(len(FIRST_COLUMNS)) in ("", FIRST_COLUMNS)


def _open_for_writing(path: Path) -> TextIO:
    try:
        # backslashreplace: a file name may hold bytes that are not text
        return path.open("w", newline="", encoding=CSV_ENCODING, errors="backslashreplace")
    except OSError as error:
        raise DataError(
            f"{path.absolute()} cannot be written ({error.strerror}); run the command in a folder "
            "of your own"
        ) from error


def write_predictions(
    path: Path,
    batches: Iterator[list[tuple[str, Prediction | str]]],
    num_images: int,
    top_k: int,
) -> set[str]:
    """Write a row per image as it is predicted, log a summary, and return those that failed."""
    columns = [f"{part}_{rank + 1}" for rank in range(top_k) for part in ("class", "probability")]
    counts, unread, began = Counter[str](), list[str](), time.perf_counter()
    bar = tqdm(total=num_images, unit=" images", disable=None, leave=False)
    with _open_for_writing(path) as file, logging_redirect_tqdm(), bar:
        writer = csv.writer(file)
        writer.writerow(["file", "verdict", *columns, "error"])
        for batch in batches:
            writer.writerows(_row(image, answer, top_k) for image, answer in batch)
            unread += [image for image, answer in batch if isinstance(answer, str)]
            counts.update(a.verdict for _, a in batch if not isinstance(a, str))
            bar.update(len(batch))
    rate = num_images / (time.perf_counter() - began)
    _log_summary(path, counts, unread, rate)
    return set(unread)


def _row(image: str, answer: Prediction | str, top_k: int) -> list[str]:
    # A path that looks like a formula is relative; with ./ it is the same file and no formula. No
    # class name begins so: they are normalized where the data is read.
    file = os.path.join(os.curdir, image) if image.startswith(FORMULA_STARTS) else image
    if isinstance(answer, str):
        return [file, "", *[""] * 2 * top_k, answer]
    cells = (cell for name, probability in answer.top for cell in (name, f"{probability:.6f}"))
    return [file, answer.verdict, *cells, ""]


def _log_summary(path: Path, counts: Counter[str], unread: list[str], rate: float) -> None:
    verdicts = ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in VERDICT_WORDS)
    total = counts.total() + len(unread)
    failed = f"{len(unread):,} could not be read"
    logger.info("%s images: %s, %s; %.1f images/s", f"{total:,}", verdicts, failed, rate)
    if unread:
        logger.warning("could not be read (see the column error): %s", join_names(unread))
    logger.info("predictions %s", path)
