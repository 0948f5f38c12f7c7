"""The INT8 form: weights and activations in 8-bit integers, for CPUs with instructions for them.

Post-training, static: what range each activation needs is seen on training photos. Weights are
int8, with a scale for each channel; activations uint8, from the lowest to the highest value seen.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from app.ml.predictor import import_onnxruntime
from app.ml.preprocessing import PreprocessConfig, normalize

CALIBRATION_BATCH = 2  # all activations of as many images are in memory: 0.1 GB for each
# From the last pooling to the logits all stays in float: it takes a hundredth of the time, and an
# answer should not be rounded to 256 steps.
HEAD_OPERATORS = {"GlobalAveragePool", "ReduceMean", "Flatten", "Gemm"}


def quantize(model: bytes, images: Tensor, config: PreprocessConfig) -> bytes:
    """Quantize an ONNX network; what its two outputs are called and mean stays.

    images: calibrate on these, uint8 (N, 3, crop, crop).

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
            CalibrationBatches(images, config),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=head_nodes(folded),
        )
        return quantized.read_bytes()


@contextlib.contextmanager
def quiet_root_logger() -> Iterator[None]:
    """Inside, nothing that is logged by the root logger itself is shown, as our lines are not.

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


def head_nodes(path: Path) -> list[str]:
    """Name the nodes of an ONNX file that lead from the last pooling to the logits."""
    import onnx

    found, wanted = [], {"logits"}
    for node in reversed(onnx.load(str(path)).graph.node):  # they stand in the order of computing
        if node.op_type in HEAD_OPERATORS and wanted & set(node.output):
            found.append(node.name)
            wanted |= set(node.input)
    return found


class CalibrationBatches:
    """Gives the quantizer a few images at a time, as its CalibrationDataReader does."""

    def __init__(self, images: Tensor, config: PreprocessConfig) -> None:
        self.batches = self._normalized(images, config)

    def _normalized(
        self, images: Tensor, config: PreprocessConfig
    ) -> Iterator[dict[str, np.ndarray]]:
        for part in images.split(CALIBRATION_BATCH):
            yield {"images": np.ascontiguousarray(normalize(part, config))}

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)
