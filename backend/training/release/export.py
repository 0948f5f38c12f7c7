"""The forms in which a model is released: how each is written, and how closely it must answer.

A form is a row of `FORMS`, named after the runtime of `app.ml.predictor` that reads it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from app.ml.artifacts import SaveError, reason_of, state_bytes
from app.ml.forms import Runtime
from app.ml.model import BACKBONES, ServedNetwork
from app.ml.predictor import OnnxNetwork, load_model_for_inference
from app.ml.preprocessing import PreprocessConfig, normalize
from training.compute.quantization import quantize
from training.compute.tracing import trace
from training.errors import VerificationError

NUM_COMPARED = 31  # not a multiple of the two images that a network is traced with


@dataclass(frozen=True)
class Source:
    """What the forms of a model are made from.

    calibration: training images, uint8 (N, 3, crop, crop).
    """

    model: nn.Module
    model_name: str
    preprocessing: PreprocessConfig
    calibration: Tensor

    @property
    def is_tried(self) -> bool:
        """Whether the network is known to have a right ONNX form, which not all of timm's have."""
        return self.model_name in BACKBONES

    @cached_property
    def onnx(self) -> bytes:
        """The ONNX form, from which others are made."""
        return onnx_bytes(self.model, self.model_name, self.preprocessing.crop)


def export_state(source: Source) -> memoryview:
    """Write the plain state_dict, loadable without this project."""
    state = source.model.state_dict()
    return state_bytes({name: tensor.contiguous() for name, tensor in state.items()})


def export_onnx(source: Source) -> bytes:
    """Write the network, batch-norm folded: images (N, 3, crop, crop) to logits and features.

    Raises:
        VerificationError: the file of a network that was not tried before gives other logits.
    """
    if not source.is_tried:
        images = normalize(source.calibration[:NUM_COMPARED], source.preprocessing)
        with torch.inference_mode():
            expected = ServedNetwork(source.model, source.model_name).eval()(images)[0]
        difference = float((OnnxNetwork(source.onnx, None)(images)[0] - expected).abs().max())
        if not difference <= FORMS["onnx"].tolerance:
            raise VerificationError(f"its logits differ from the network's by up to {difference:g}")
    return source.onnx


def export_int8(source: Source) -> bytes:
    """Write the same in 8-bit integers, which changes the answers a little."""
    return quantize(source.onnx, normalize(source.calibration, source.preprocessing))


def onnx_bytes(model: nn.Module, model_name: str, crop: int) -> bytes:
    """Trace the network as it is served."""
    return trace(ServedNetwork(model, model_name), crop, "logits", "pooled")


@dataclass(frozen=True)
class Form:
    """One form of the model.

    tolerance: how far its logits may be from the trained network's, or, if its answers are its own,
    from those it gave when they were judged. has_own_answers: it is measured and calibrated by
    itself, and released where it is as good as the plain network.
    """

    export: Callable[[Source], bytes | memoryview]
    tolerance: float
    has_own_answers: bool = False


FormFiles = dict[Runtime, bytes | memoryview]
FORMS: dict[Runtime, Form] = {
    "torch": Form(export_state, tolerance=0.0),
    "onnx": Form(export_onnx, tolerance=1e-3),
    "int8": Form(export_int8, tolerance=1e-3, has_own_answers=True),
}


def export_forms(source: Source) -> tuple[FormFiles, dict[Runtime, str]]:
    """Write the model in every form; return them, and why others are missing.

    Those with answers of their own may be missing, and of a network that was not tried before, all
    but its weights.

    Raises:
        SaveError: another one cannot be written.
    """
    forms: FormFiles = {}
    missing: dict[Runtime, str] = {}
    for runtime, form in FORMS.items():
        try:
            forms[runtime] = form.export(source)
        except Exception as error:
            reason = reason_of(error)
            if not form.has_own_answers and (source.is_tried or runtime == "torch"):
                raise SaveError(
                    f"the model could not be written for {runtime}: {reason}; earlier versions are "
                    "untouched"
                ) from error
            missing[runtime] = f"it could not be made: {reason}"
    return forms, missing


def check_logits(
    folder: Path, version: int, images: Tensor, expected: dict[Runtime, Tensor]
) -> None:
    """Load a version in each of these forms, which must give these logits.

    images: uint8 (N, 3, crop, crop). expected: (N, C) each.

    Raises:
        VerificationError: one gives others.
    """
    for runtime, wanted in expected.items():
        logits = load_model_for_inference(folder, version, runtime=runtime).logits(images)
        difference = float((logits - wanted).abs().max())
        allowed = FORMS[runtime].tolerance
        if not difference <= allowed:  # nor may it be NaN
            raise VerificationError(
                f"the saved model ({runtime}) does not reproduce the logits of the trained one: "
                f"they differ by up to {difference:.2g}; the limit is {allowed:g}"
            )
