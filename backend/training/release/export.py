"""The forms in which a model is released: how each is written, and how closely it must answer.

A form is a row of `FORMATS`, named after the runtime of `app.ml.predictor` that reads it.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.ml.artifacts import ONNX, WEIGHTS, state_bytes
from app.ml.model import ServedNetwork, inference_copy
from app.ml.predictor import Runtime, load_model_for_inference
from app.ml.preprocessing import PreprocessConfig
from training.errors import VerificationError


def export_state(model: nn.Module, _name: str, _config: PreprocessConfig) -> memoryview:
    """Write the plain state_dict, loadable without this project."""
    return state_bytes({name: tensor.contiguous() for name, tensor in model.state_dict().items()})


def export_onnx(model: nn.Module, model_name: str, config: PreprocessConfig) -> bytes:
    """Write the network, batch-norm folded: images (N, 3, crop, crop) to logits and features."""
    served = ServedNetwork(model, model_name)
    network = inference_copy(served, torch.device("cpu"), torch.float32)
    network = network.to(memory_format=torch.contiguous_format)
    example = torch.zeros(2, 3, config.crop, config.crop)
    buffer: Any = io.BytesIO()  # taken by the exporter, though not declared
    with warnings.catch_warnings():
        # torch calls this exporter the legacy one. For these networks it gives the same graph as
        # the new one in a fifth of the time (3 s instead of 15) and needs no further package.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.onnx.export(
            network,
            (example,),
            buffer,
            dynamo=False,
            input_names=["images"],
            output_names=["logits", "pooled"],
            dynamic_axes={"images": {0: "n"}, "logits": {0: "n"}, "pooled": {0: "n"}},
            opset_version=17,
        )
    return buffer.getvalue()


@dataclass(frozen=True)
class Format:
    """One form of the model.

    suffix: of its file's name. tolerance: how far its logits may be from the trained network's.
    """

    suffix: str
    export: Callable[[nn.Module, str, PreprocessConfig], bytes | memoryview]
    tolerance: float


FORMATS: dict[Runtime, Format] = {
    "torch": Format(WEIGHTS, export_state, tolerance=0.0),
    "onnx": Format(ONNX, export_onnx, tolerance=1e-3),
}


def check_logits(folder: Path, version: int, images: Tensor, expected: Tensor) -> None:
    """Load a version in each of its forms; all must give these logits.

    images: uint8 (N, 3, crop, crop). expected: (N, C).

    Raises:
        VerificationError: one gives others.
    """
    for runtime, form in FORMATS.items():
        logits = load_model_for_inference(folder, version, runtime=runtime).logits(images)
        difference = float((logits - expected).abs().max())
        if not difference <= form.tolerance:  # nor may it be NaN
            raise VerificationError(
                f"the saved model ({runtime}) does not reproduce the logits of the trained one: "
                f"they differ by up to {difference:.2g}, allowed is {form.tolerance:g}"
            )
