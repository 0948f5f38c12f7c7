"""The LiteRT file in 8-bit integers: made from training photos, and judged on validation photos."""

import contextlib
from pathlib import Path

import torch
from torch import Tensor

from app.ml.machine import num_cores
from app.ml.predictor import FoodPredictor
from training.data.loader import eval_loader
from training.data.splits import FoodData, Split
from training.release.evaluation import (
    EVAL_BATCH_SIZE,
    FormComparison,
    nothing_read,
    read_images,
    some_of,
)
from training.release.standalone import INPUT, ExportError
from training.release.standalone_formats import Exported, litert_runner, quiet_output, write_facts

CALIBRATION_IMAGES = 100  # the converter looks at each for a second
INTEGER_OPERATORS = (  # the pixels before them and the answers behind them stay in float
    "CONV_2D",
    "DEPTHWISE_CONV_2D",
    "ADD",
    "PAD",
    "PADV2",
    "AVERAGE_POOL_2D",
    "MAX_POOL_2D",
    "RELU",
    "LOGISTIC",
    "HARD_SWISH",
)


def export_litert_int8(
    plain: Path, predictor: FoodPredictor, data: FoodData, seed: int
) -> Exported:
    """Write the file beside the plain one, if it answers the validation photos as well.

    Its thresholds and its temperature are the plain network's.

    Raises:
        ExportError: it does not. SaveError: no photo can be read.
    """
    path = plain.with_suffix(".int8.tflite")
    paths = some_of(data.train, CALIBRATION_IMAGES, seed)
    images = read_images(paths, predictor.record.preprocessing)
    with quiet_output():
        path.write_bytes(quantized(plain, images))
    comparison = compared_on(data.val, predictor, path)
    if comparison.is_worse:
        path.unlink()
        raise ExportError(str(comparison))
    write_facts(path, predictor)
    return Exported(path, str(comparison))


def quantized(plain: Path, images: Tensor) -> bytes:
    """Quantize a LiteRT file. images: calibrate on these, uint8 (N, 3, crop, crop)."""
    from ai_edge_quantizer import qtyping, quantizer

    converter = quantizer.Quantizer(str(plain))
    for name in INTEGER_OPERATORS:
        operator = qtyping.TFLOperationName[name]
        converter.add_static_config(".*", operator, activation_num_bits=8, weight_num_bits=8)
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    samples = {"serving_default": [{INPUT: image[None]} for image in pixels]}
    seen = converter.calibrate(samples, num_threads=num_cores())
    return bytes(converter.quantize(seen).quantized_model)


def compared_on(split: Split, predictor: FoodPredictor, path: Path) -> FormComparison:
    """Compare the answers of a file with the version's.

    Raises:
        SaveError: no image can be read.
    """
    run, config = litert_runner(path), predictor.record.preprocessing
    rights: list[Tensor] = []  # (2, N): whether the version and the file are right
    loader = eval_loader(split.paths, config, EVAL_BATCH_SIZE, 0, torch.device("cpu"))
    with contextlib.closing(loader):
        for batch in loader:
            labels = torch.from_numpy(split.labels)[batch.indices]
            answers = run(batch.images.permute(0, 2, 3, 1).contiguous()).probabilities
            given = torch.stack([predictor.logits(batch.images), answers])
            rights.append(given.argmax(dim=2) == labels)
    if not sum(right.shape[1] for right in rights):
        raise nothing_read(split.paths)
    return FormComparison.of(*torch.cat(rights, dim=1).numpy())
