"""The LiteRT files with smaller numbers, each kept if it answers the validation photos as well."""

import contextlib
import logging
from collections.abc import Sequence
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
from training.release.standalone import INPUT
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

logger = logging.getLogger(__name__)


def export_smaller(
    plain: Path, predictor: FoodPredictor, data: FoodData, seed: int
) -> list[Exported]:
    """Write beside the plain file those in 16-bit and 8-bit numbers, and keep what passes.

    Their thresholds and their temperature are the plain network's.

    Raises:
        SaveError: no photo can be read.
    """
    chosen = some_of(data.train, CALIBRATION_IMAGES, seed)
    images = read_images(chosen, predictor.record.preprocessing)
    paths = [plain.with_suffix(suffix) for suffix in (".fp16.tflite", ".int8.tflite")]
    with quiet_output():
        for path, file in zip(paths, (halved(plain), quantized(plain, images)), strict=True):
            path.write_bytes(file)
    kept = []
    for path, comparison in zip(paths, compared_on(data.val, predictor, paths), strict=True):
        if comparison.is_worse:
            path.unlink()
            logger.info("no %s: %s", path.name, comparison)
        else:
            write_facts(path, predictor)
            kept.append(Exported(path, str(comparison)))
    return kept


def halved(plain: Path) -> bytes:
    """Round the weights of a LiteRT file to 16 bits; what is computed with them stays in 32."""
    from ai_edge_quantizer import qtyping, quantizer
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    weights = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
    converter = quantizer.Quantizer(str(plain))
    converter.update_quantization_recipe(
        regex=".*",
        operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
        algorithm_key=AlgorithmName.FLOAT_CASTING,
        op_config=qtyping.OpQuantizationConfig(
            weight_tensor_config=weights,
            compute_precision=qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        ),
    )
    return bytes(converter.quantize().quantized_model)


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


def compared_on(
    split: Split, predictor: FoodPredictor, paths: Sequence[Path]
) -> list[FormComparison]:
    """Compare the answers of files with the version's.

    Raises:
        SaveError: no image can be read.
    """
    runners, config = [litert_runner(path) for path in paths], predictor.record.preprocessing
    rights: list[Tensor] = []  # (1 + files, N): whether the version and each file are right
    loader = eval_loader(split.paths, config, EVAL_BATCH_SIZE, 0, torch.device("cpu"))
    with contextlib.closing(loader):
        for batch in loader:
            labels = torch.from_numpy(split.labels)[batch.indices]
            pixels = batch.images.permute(0, 2, 3, 1).contiguous()
            answers = [run(pixels).probabilities for run in runners]
            given = torch.stack([predictor.logits(batch.images), *answers])
            rights.append(given.argmax(dim=2) == labels)
    if not sum(right.shape[1] for right in rights):
        raise nothing_read(split.paths)
    version, *files = torch.cat(rights, dim=1).numpy()
    return [FormComparison.of(version, file) for file in files]
