"""The files that other runtimes read: ONNX, LiteRT and Core ML, each written and then checked."""

import contextlib
import importlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from app.ml.artifacts import file_name, read_checked, read_record
from app.ml.durable import write_durably
from app.ml.forms import FORM_SUFFIXES, Runtime
from app.ml.model import BACKBONES
from app.ml.predictor import FoodPredictor, OnnxNetwork, forms_of, load_model_for_inference
from training.release.standalone import (
    INPUT,
    PROBABILITIES,
    SAME,
    SIMILARITY,
    Answers,
    ExportError,
    StandaloneNetwork,
    answers_of,
    facts_of,
    pictures,
)

FEW_NUMBERS = 16  # in a constant that is not looked at: shapes, axes, steps


class Exported(NamedTuple):
    """A file that was written, and what was found when it was checked."""

    path: Path
    finding: str


def import_package(module: str, package: str, format: str) -> Any:
    """Import a package that only one format needs.

    Raises:
        ExportError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExportError(f"--format {format} needs a package: pip install {package}") from error


def checked(path: Path, predictor: FoodPredictor, run: Callable[[Tensor], Answers]) -> Exported:
    """Ask a file and the version about the same pictures.

    Raises:
        ExportError: they do not answer the same.
    """
    images = pictures(predictor.record.preprocessing.crop)
    difference = run(images).difference(answers_of(predictor, images))
    if not difference <= SAME:  # nor may it be NaN
        raise ExportError(
            f"{path.name} does not answer as version {predictor.record.version} does: its "
            f"probabilities differ by up to {difference:.2g}; the limit is {SAME:g}"
        )
    return Exported(path, f"answers differ by up to {difference:.2g} from those of the version")


def write_facts(path: Path, predictor: FoodPredictor) -> None:
    """Write beside a file what an app must know: not every runtime reads what is inside it."""
    facts = facts_of(predictor.record, predictor.runtime)
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    write_durably(path.with_name(f"{path.name}.json"), text.encode())


@contextlib.contextmanager
def quiet_output() -> Iterator[None]:
    """Inside, what converters say about their progress is not shown."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def network_of(predictor: FoodPredictor) -> StandaloneNetwork:
    """Put the pixels before and the answers behind a version's PyTorch form."""
    network: nn.Module = predictor.network.model  # type: ignore[union-attr]
    return StandaloneNetwork(predictor, network.to(memory_format=torch.contiguous_format)).eval()


# ONNX -----------------------------------------------------------------------------------------


def export_onnx(model_dir: Path, version: int, folder: Path) -> list[Exported]:
    """Write the version's own ONNX and INT8 files with the pixels before and the answers behind."""
    others = [runtime for runtime in forms_of(read_record(model_dir, version)) if runtime != "onnx"]
    runtimes: list[Runtime] = ["onnx", *(runtime for runtime in others if runtime != "torch")]
    exported = []
    for runtime in runtimes:
        predictor = load_model_for_inference(model_dir, version, runtime=runtime)
        name = file_name(version, FORM_SUFFIXES[runtime])
        data = standalone_onnx(read_checked(model_dir, name, predictor.record), predictor)
        write_durably(folder / name, data)
        write_facts(folder / name, predictor)
        exported.append(checked(folder / name, predictor, onnx_runner(data)))
    return exported


# Operator, inputs, output and attributes of what stands around the network, whose own input is
# `images`. In this order, as in `normalize`: INT8 turns other roundings into other answers.
Node = tuple[str, list[str], str, dict[str, Any]]
BEFORE: list[Node] = [
    ("Transpose", [INPUT], "image_nchw", {"perm": [0, 3, 1, 2]}),
    ("Cast", ["image_nchw"], "pixels", {"to": 1}),  # to float32
    ("Div", ["pixels", "white"], "shares", {}),
    ("Sub", ["shares", "mean"], "centered", {}),
    ("Div", ["centered", "std"], "images", {}),
]
BEHIND: list[Node] = [
    ("Div", ["logits", "temperature"], "calibrated_logits", {}),
    ("Softmax", ["calibrated_logits"], PROBABILITIES, {"axis": 1}),
    ("LpNormalization", ["pooled"], "direction", {"axis": 1, "p": 2}),
    ("Gemm", ["direction", "centroids"], "similarities", {"transB": 1}),
    ("ReduceMax", ["similarities"], SIMILARITY, {"axes": [1], "keepdims": 0}),
]


def standalone_onnx(plain: bytes, predictor: FoodPredictor) -> bytes:
    """Add to an ONNX file of ours what `StandaloneNetwork` adds, and what an app must know."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model, value = onnx.load_from_string(plain), helper.make_tensor_value_info
    graph, network = model.graph, StandaloneNetwork(predictor, nn.Identity())
    before, behind = (
        [helper.make_node(op, ins, [out], name=out, **more) for op, ins, out, more in nodes]
        for nodes in (BEFORE, BEHIND)
    )
    constants = {name: buffer.numpy() for name, buffer in network.named_buffers()}
    constants["temperature"] = np.array(network.temperature, dtype=np.float32)
    constants["white"] = np.array(255, dtype=np.float32)
    crop = predictor.record.preprocessing.crop
    image = value(INPUT, TensorProto.UINT8, ["n", crop, crop, 3])
    probabilities = value(PROBABILITIES, TensorProto.FLOAT, ["n", len(predictor.classes)])
    similarity = value(SIMILARITY, TensorProto.FLOAT, ["n"])
    around = helper.make_graph(
        [*before, *graph.node, *behind],
        file_name(predictor.record.version, ""),
        [image],
        [probabilities, similarity],
        [*graph.initializer, *(numpy_helper.from_array(v, name) for name, v in constants.items())],
    )
    model.graph.CopyFrom(around)
    helper.set_model_props(model, metadata(predictor))
    return bytes(model.SerializeToString())


def metadata(predictor: FoodPredictor) -> dict[str, str]:
    """Return what an app must know as text; lists are JSON."""
    facts = facts_of(predictor.record, predictor.runtime)
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in facts.items()
    }


def onnx_runner(data: bytes) -> Callable[[Tensor], Answers]:
    session = OnnxNetwork(data, None).session

    def run(images: Tensor) -> Answers:
        given = session.run([PROBABILITIES, SIMILARITY], {INPUT: images.numpy()})
        return Answers(*map(torch.from_numpy, given))

    return run


# LiteRT ---------------------------------------------------------------------------------------


def export_litert(predictor: FoodPredictor, folder: Path) -> Exported:
    """Write the network for one picture at a time."""
    path = folder / file_name(predictor.record.version, ".tflite")
    example = {INPUT: pictures(predictor.record.preprocessing.crop)[:1]}
    with quiet_output():
        litert_torch = import_package("litert_torch", "litert-torch", "litert")
        litert_torch.convert(network_of(predictor), sample_kwargs=example).export(str(path))
    write_facts(path, predictor)
    return checked(path, predictor, litert_runner(path))


def litert_runner(path: Path) -> Callable[[Tensor], Answers]:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(str(path)).get_signature_runner()

    def run(images: Tensor) -> Answers:
        given = [runner(**{INPUT: image.numpy()}) for image in images.split(1)]
        parts = [[torch.from_numpy(g[name]) for g in given] for name in (PROBABILITIES, SIMILARITY)]
        return Answers(*map(torch.cat, parts))

    return run


# Core ML --------------------------------------------------------------------------------------


class PixelsFirst(nn.Module):
    """The network as Core ML calls it: with the colors of an image first, as floats of 0 to 255."""

    def __init__(self, network: StandaloneNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        answers = self.network.answers(image)
        return answers[PROBABILITIES], answers[SIMILARITY]


def export_coreml(model_dir: Path, version: int, folder: Path) -> list[Exported]:
    """Write an ML program in 16 bits. Its runtime is on Apple's systems only, so what is checked is
    its description and that it holds the weights of the version."""
    predictor = load_model_for_inference(model_dir, version, runtime="torch")
    record, network = predictor.record, network_of(predictor)
    crop = record.preprocessing.crop
    path = folder / file_name(version, ".mlpackage")
    with quiet_output():
        coremltools = import_package("coremltools", "coremltools", "coreml")
        program = torch.export.export(PixelsFirst(network), (torch.zeros(1, 3, crop, crop),))
        model = coremltools.convert(
            program.run_decompositions({}),
            inputs=[coremltools.ImageType(INPUT, shape=(1, 3, crop, crop))],
            outputs=[coremltools.TensorType(PROBABILITIES), coremltools.TensorType(SIMILARITY)],
            minimum_deployment_target=coremltools.target.iOS16,
            skip_model_load=True,
        )
        model.short_description = f"{file_name(version, '')}: which dish is on a photo"
        model.user_defined_metadata.update(metadata(predictor))
        model.save(str(path))
        written = coremltools.models.MLModel(str(path), skip_model_load=True)
        check_description(written, crop)
        finding = found_weights(written, network, is_tried=record.model_name in BACKBONES)
    write_facts(path, predictor)
    return [Exported(path, f"{finding}; not run, which only Apple's systems can")]


def check_description(model: Any, crop: int) -> None:
    """Compare what a written model takes and gives with what it should.

    Raises:
        ExportError: it is something else.
    """
    description = model.get_spec().description
    image, names = description.input[0].type.imageType, [o.name for o in description.output]
    if (image.width, image.height, names) != (crop, crop, [PROBABILITIES, SIMILARITY]):
        raise ExportError(f"the Core ML model takes {image.width} pixels and gives {names}")


def found_weights(model: Any, network: StandaloneNetwork, *, is_tried: bool) -> str:
    """Look for each constant of a written model among the weights; say how many were found.

    is_tried: all have to be. In other networks the converter may merge some with their neighbors.

    Raises:
        ExportError: too few are.
    """
    ours: dict[int, list[np.ndarray]] = {}
    for tensor in network.state_dict().values():
        ours.setdefault(tensor.numel(), []).append(tensor.flatten().numpy())
    constants = coreml_weights(model)
    found = sum(
        any(np.allclose(value, tensor, rtol=1e-3, atol=1e-4) for tensor in ours.get(value.size, ()))
        for value in constants.values()
    )
    finding = f"{found} of {len(constants)} constants are weights of the version"
    if not found or (is_tried and found < len(constants)):
        raise ExportError(f"the Core ML model is not the version: {finding}")
    return finding


def coreml_weights(model: Any) -> dict[str, np.ndarray]:
    """Return the constants of some size, flat, by name."""
    from coremltools.optimize.coreml import get_weights_metadata

    found = get_weights_metadata(model, weight_threshold=FEW_NUMBERS)
    return {name: np.ravel(weight.val).astype(np.float32) for name, weight in found.items()}
