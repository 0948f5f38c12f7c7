"""Networks as ONNX files."""

import io
import warnings
from typing import Any

import torch
from torch import nn

from app.ml.model import inference_copy
from training.compute.padding import fix_padding


def trace(network: nn.Module, crop: int, *outputs: str, any_size: bool = False) -> bytes:
    """Write a network, batch-norm folded: images (N, 3, crop, crop) to outputs of these names.

    any_size: of maps (N, C, H, W), for images of other sizes too that need the same padding.
    """
    copy = inference_copy(network, torch.device("cpu"), torch.float32, crop)
    copy = copy.to(memory_format=torch.contiguous_format)
    fix_padding(copy, crop)
    example = torch.zeros(2, 3, crop, crop)
    buffer: Any = io.BytesIO()  # taken by the exporter, though not declared
    with warnings.catch_warnings():
        # torch calls this exporter the legacy one. For these networks it gives the same graph as
        # the new one in a fifth of the time (3 s instead of 15) and needs no further package.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        # What follows from the size of the pictures is a constant of the file, and meant to be.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        # It writes a padding as arithmetic on constants, which onnxruntime does once.
        warnings.filterwarnings("ignore", "Constant folding", UserWarning)
        torch.onnx.export(
            copy,
            (example,),
            buffer,
            dynamo=False,
            input_names=["images"],
            output_names=list(outputs),
            dynamic_axes={
                name: {0: "n", **({2: f"{name}_height", 3: f"{name}_width"} if any_size else {})}
                for name in ("images", *outputs)
            },
            opset_version=17,
        )
    return buffer.getvalue()
