"""The INT8 form: weights and activations in 8-bit integers, for CPUs with instructions for them.

Post-training, static: what range each activation needs is seen on training photos. Weights are
int8, with a scale for each channel; activations uint8, from the lowest to the highest value seen.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from app.ml.predictor import import_onnxruntime

CALIBRATION_IMAGES = 50  # show the ranges of the activations; 200 are no better
CALIBRATION_BATCH = 2  # all activations of as many images are in memory: 0.1 GB for each
# From the last pooling on, all stays in float: it takes a hundredth of the time, and neither an
# answer nor what a head is trained on should be rounded to 256 steps.
HEAD_OPERATORS = {"GlobalAveragePool", "ReduceMean", "Flatten", "Gemm"}
FEW_CHANNELS = 3  # in each group of a convolution


def quantize(model: bytes, pixels: Tensor) -> bytes:
    """Quantize an ONNX network; what its input and its outputs are called and mean stays.

    pixels: calibrate on these, standardized (N, 3, crop, crop).

    Raises:
        Exception: onnxruntime's quantizer may raise anything on a network that it cannot do.
    """
    import_onnxruntime()  # first, with its telemetry off
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="nutrilearn-int8-") as folder, quiet_root_logger():
        plain, folded, quantized = (Path(folder) / name for name in ("plain", "folded", "int8"))
        plain.write_bytes(model)
        quant_pre_process(str(plain), str(folded), skip_symbolic_shape=True)
        quantize_static(
            str(folded),
            str(quantized),
            CalibrationBatches(pixels),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=float_nodes(folded),
        )
        return quantized.read_bytes()


@contextlib.contextmanager
def quiet_root_logger() -> Iterator[None]:
    """Inside, drop what is logged by the root logger itself; our own lines use other loggers.

    The quantizer logs hundreds of lines there about single tensors of a transformer.
    """
    root = logging.getLogger()
    root.addFilter(_nothing)
    try:
        yield
    finally:
        root.removeFilter(_nothing)


def _nothing(_: logging.LogRecord) -> bool:
    return False


def float_nodes(path: Path) -> list[str]:
    """Name the nodes of an ONNX file that stay in float: its stem and its head."""
    import onnx

    graph = onnx.load(str(path)).graph
    return stem_nodes(graph) + head_nodes(graph)


def stem_nodes(graph: Any) -> list[str]:
    """Name the nodes up to the first convolution of many channels: a sum of few products, as over
    three colors or in a depthwise convolution, is faster in float (0.9 ms instead of 1.4)."""
    channels = {tensor.name: tensor.dims[1] for tensor in graph.initializer if len(tensor.dims) > 1}
    found: list[str] = []
    for node in graph.node:  # they stand in the order of computing
        if node.op_type == "Conv" and channels.get(node.input[1], np.inf) > FEW_CHANNELS:
            return found
        found.append(node.name)
    return []  # no convolution of many channels: nothing would be left


def head_nodes(graph: Any) -> list[str]:
    """Name the nodes from the last pooling to the outputs."""
    found, wanted = [], {output.name for output in graph.output}
    for node in reversed(graph.node):
        if node.op_type in HEAD_OPERATORS and wanted & set(node.output):
            found.append(node.name)
            wanted |= set(node.input)
    return found


class CalibrationBatches:
    """Gives the quantizer a few images at a time, as its CalibrationDataReader does."""

    def __init__(self, pixels: Tensor) -> None:
        self.batches = iter(pixels.split(CALIBRATION_BATCH))

    def get_next(self) -> dict[str, np.ndarray] | None:
        pixels = next(self.batches, None)
        return None if pixels is None else {"images": np.ascontiguousarray(pixels)}
