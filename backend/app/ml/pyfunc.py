"""The model as MLflow loads it: a column of images in, a table of answers out.

A registered version holds a copy of this package, and MLflow calls `_load_pyfunc`. Nothing here
imports mlflow: MLflow imports this.
"""

import base64
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from app.ml.machine import num_cores
from app.ml.predictor import FoodPredictor, Prediction, load_model_for_inference
from app.ml.preprocessing import ImageError, UnreadableImageError

COLUMN = "image"
TOP_K = 3
BATCH_SIZE = 32  # pictures that are in memory at once
SHOWN = 60  # characters of a cell in its error


def _load_pyfunc(model_dir: str, config: dict[str, Any]) -> "FoodTable":
    """Load the version in a folder; MLflow looks for a function of this name.

    config: `record` (of the version), `runtime`, `device` and `num_threads`, which
    `mlflow.pyfunc.load_model(uri, model_config={...})` replaces one by one.
    """
    predictor = load_model_for_inference(
        model_dir,
        config["record"]["version"],
        config["device"],
        num_threads=config["num_threads"],
        runtime=config["runtime"],
    )
    return FoodTable(predictor, config["num_threads"] or num_cores())


class FoodTable:
    """Answers tables; a picture that cannot be read has an error in its row, and stops nothing."""

    def __init__(self, predictor: FoodPredictor, num_readers: int) -> None:
        self.predictor = predictor
        self.num_readers = num_readers

    def predict(self, table: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Answer each row of the column `image`: bytes, base64 or the path of a file.

        params: `top_k`, at most the number of classes.

        Raises:
            ValueError: top_k below 1.
        """
        top_k = min((params or {}).get("top_k", TOP_K), len(self.predictor.classes))
        if top_k < 1:
            raise ValueError(f"top_k must be 1 or more, not {top_k}")
        cells = list(table[COLUMN])
        answers: list[Prediction | str] = []
        with ThreadPoolExecutor(self.num_readers) as readers:
            for start in range(0, len(cells), BATCH_SIZE):
                pixels = list(readers.map(self._pixels, cells[start : start + BATCH_SIZE]))
                answers += self._answers(pixels, top_k)
        columns = ["class_name", "confidence", "verdict", "top_predictions", "error"]
        rows = [_row(answer) for answer in answers]
        # Objects: a missing confidence stays None, which JSON and Spark know, and NaN is neither.
        return pd.DataFrame(rows, table.index, columns, dtype=object)

    def _pixels(self, cell: object) -> Tensor | str:
        """Pixels, or why there are none."""
        try:
            return self.predictor.preprocess(image_bytes(cell))
        except ImageError as error:
            return str(error)
        except OSError as error:
            return f"cannot be opened ({error.strerror})"

    def _answers(self, pixels: Sequence[Tensor | str], top_k: int) -> list[Prediction | str]:
        readable = [image for image in pixels if isinstance(image, Tensor)]
        if not readable:
            return [image for image in pixels if isinstance(image, str)]
        predictions = iter(self.predictor.predict_batch(torch.stack(readable), top_k))
        return [image if isinstance(image, str) else next(predictions) for image in pixels]


def image_bytes(cell: object) -> bytes:
    """Return the file that a cell holds or names.

    Raises:
        UnreadableImageError: neither bytes, nor base64, nor the path of a file.
        OSError: a file that cannot be opened.
    """
    if isinstance(cell, (bytes, bytearray)):
        return bytes(cell)
    if not isinstance(cell, str):
        raise UnreadableImageError(f"no image, but {cell!r:.{SHOWN}}")
    if os.path.isfile(cell):  # not a pipe, which could be read forever
        with open(cell, "rb") as file:
            return file.read()
    try:
        return base64.b64decode("".join(cell.split()), validate=True)
    except ValueError as error:
        raise UnreadableImageError(f"{cell!r:.{SHOWN}} is neither a file nor base64") from error


def _row(answer: Prediction | str) -> tuple[object, ...]:
    if isinstance(answer, str):
        return (None, None, None, [], answer)
    top = [{"class_name": name, "confidence": value} for name, value in answer.top]
    first = answer.top[0]
    return (first.class_name, first.probability, answer.verdict, top, None)
