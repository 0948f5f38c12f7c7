"""What a released model sees: printed for single pictures, written as a CSV for folders of them."""

import contextlib
import csv
import logging
import os
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from app.ml.predictor import FoodPredictor, Prediction
from app.ml.preprocessing import IMAGE_EXTENSIONS, ImageError
from training.data.loader import (
    MAX_WORKERS,
    default_num_workers,
    eval_loader,
    num_cores,
)
from training.data.sources import is_image_name, listing, visible
from training.errors import DataError

BATCH_SIZE = 32
PREDICTIONS_CSV = Path("predictions.csv")  # in the current folder: photos may be read-only
FIRST_COLUMNS = "file,verdict,class_1,probability_1,"  # by which a file of ours is known
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a cell that begins so is computed by Excel
VERDICT_WORDS = {
    "confident": "confident",
    "unsure": "not sure",
    "not_food": "this does not look like a dish the model knows",
}

logger = logging.getLogger(__name__)


def predict_paths(
    model: FoodPredictor,
    paths: Sequence[str],
    *,
    top_k: int,
    csv_path: Path | None,
    device: torch.device,
    num_workers: int | str,
) -> int:
    """Answer for pictures and folders of them; the exit code.

    It is 1 if one of the pictures that were named, or all that were found, cannot be read, and 130
    after Ctrl-C.
    """
    top_k = min(top_k, len(model.classes))
    if csv_path is None and not any(map(os.path.isdir, paths)):
        return 1 if print_answers(model, paths, top_k) else 0
    csv_path = csv_path or PREDICTIONS_CSV
    check_target(csv_path)
    images = find_images(paths)
    answered = answers(model, images, top_k, device, reader_processes(num_workers, device))
    try:
        with contextlib.closing(answered):
            unread = write_answers(csv_path, answered, len(images), top_k)
    except KeyboardInterrupt:
        logger.info("stopped; %s holds what was answered until then", csv_path)
        return 130
    return 1 if len(unread) == len(images) or unread & set(paths) else 0


def reader_processes(setting: int | str, device: torch.device) -> int:
    """Without training, reading is half of the work on a CPU: "auto" gives it half of the cores."""
    if setting != "auto":
        return int(setting)
    return max(default_num_workers(device), min(MAX_WORKERS, num_cores() // 2))


def print_answers(model: FoodPredictor, paths: Sequence[str], top_k: int) -> list[str]:
    """Print what is on each picture as a person would want to read it; those that failed."""
    problems = {}
    for path in paths:
        try:
            prediction = model.predict(path, top_k)
        except (ImageError, OSError) as error:
            problems[path] = str(error)
            continue
        # backslashreplace: a file name may hold bytes that are no text
        print(os.fsencode(path).decode("utf-8", "backslashreplace"))  # noqa: T201
        for name, probability in prediction.top:
            bar = "#" * round(probability * 30)
            line = f"  {name.replace('_', ' '):<28}{probability:7.1%}  {bar}"
            print(line.rstrip())  # noqa: T201
        print(f"  {VERDICT_WORDS[prediction.verdict]}")  # noqa: T201
    for path, problem in problems.items():
        logger.error("%s: %s", path, problem)
    return list(problems)


def find_images(paths: Sequence[str]) -> list[str]:
    """Files as they are named; of folders all pictures in them and their sub-folders, by name.

    Raises:
        DataError: a folder without a picture.
    """
    found: dict[str, None] = {}
    for path in paths:
        images = list(_images_within(Path(path))) if os.path.isdir(path) else [path]
        if not images:
            raise DataError(
                f"{path} holds no picture; files named *{', *'.join(IMAGE_EXTENSIONS)} are read"
            )
        found |= dict.fromkeys(images)
    return list(found)


def _images_within(folder: Path) -> Iterator[str]:
    for entry in visible(folder):
        if entry.is_dir(follow_symlinks=False):  # a link may lead back up
            yield from _images_within(Path(entry.path))
        # A link that leads nowhere is said to be unreadable; a pipe would be waited for.
        elif is_image_name(entry.name) and (entry.is_file() or not os.path.exists(entry.path)):
            yield entry.path


def answers(
    model: FoodPredictor, images: Sequence[str], top_k: int, device: torch.device, num_workers: int
) -> Generator[list[tuple[str, Prediction | str]], None, None]:
    """Each image with its prediction, or the reason why there is none; in order, by the batch."""
    # Readers work ahead of the network: for the first batch there is nothing to be ahead of.
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
    """Only a file that was written here before may be replaced.

    Raises:
        OSError: it is something else, or cannot be looked into.
    """
    if path.is_dir():
        raise IsADirectoryError(f"--predictions {path} is a folder; name a file in it")
    if not path.is_file():  # new, or a device such as /dev/stdout
        return
    with path.open("rb") as file:
        start = file.read(len(FIRST_COLUMNS))
    if start not in (b"", FIRST_COLUMNS.encode()):
        raise FileExistsError(
            f"{path} is there already and is no list of predictions, so it is kept; name another "
            "file with --predictions"
        )


def write_answers(
    path: Path,
    batches: Iterator[list[tuple[str, Prediction | str]]],
    num_images: int,
    top_k: int,
) -> set[str]:
    """Write a row per image as answers come in, and say how it went; the images that failed."""
    columns = [f"{part}_{rank + 1}" for rank in range(top_k) for part in ("class", "probability")]
    counts, unread, began = Counter[str](), list[str](), time.perf_counter()
    bar = tqdm(total=num_images, unit=" images", disable=None, leave=False)
    # backslashreplace: a file name may hold bytes that are no text
    with (
        path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        logging_redirect_tqdm(),
        bar,
    ):
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
    # A path that looks like a formula can only be relative; with ./ it is the same file and no
    # formula. No class name can begin so: they are normalised where the data is read.
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
        logger.warning("could not be read (the column error says why): %s", listing(unread))
    logger.info("predictions %s", path)
