"""Load a released model and ask it what is on a photo; the server and `--predict` use this.

`load_model_for_inference` checks every file before it is used and gives a `FoodPredictor`.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from app.ml.artifacts import (
    DamagedArtifactError,
    ModelRecord,
    NoModelError,
    file_name,
    read_centroids,
    read_checked,
    read_record,
    read_state,
)
from app.ml.drift import Verdict
from app.ml.forms import FORM_SUFFIXES, Runtime
from app.ml.machine import num_cores
from app.ml.model import ServedNetwork, backbone, build_model, head_linear, inference_copy
from app.ml.preprocessing import EvalTransform, ImageSource, load_image, normalize

TIMED_SECONDS = 0.06  # spent on each form to find the fastest, or more on a slow machine
TIMED_CALLS = 5
OUT_OF_MEMORY = ("Failed to allocate", "bad allocation", "bad_alloc")  # in onnxruntime's errors
CLEARLY_FASTER = 1.1  # less may be chance, and answers should not change from start to start


class ClassProbability(NamedTuple):
    """A class and its calibrated probability, 0 to 1."""

    class_name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The answer for one image: the most probable classes first, and how far to trust the first."""

    top: list[ClassProbability]
    verdict: Verdict


class FoodPredictor:
    """A loaded model; safe to call from several threads at once."""

    def __init__(
        self,
        record: ModelRecord,
        network: "TorchNetwork | OnnxNetwork",
        centroids: Tensor,
        runtime: Runtime = "torch",
    ) -> None:
        self.record = record
        self.network = network
        self.centroids = centroids  # unit vectors, (num_classes, num_features)
        self.runtime = runtime
        self.decision = record.decision_of(runtime)
        self.classes = record.classes
        self._transform = EvalTransform(record.preprocessing)

    def preprocess(self, image: ImageSource) -> Tensor:
        """Load an image as uint8 pixels, (3, crop, crop).

        Raises:
            ImageError: it cannot be used.
        """
        return self._transform(load_image(image))

    def logits(self, images: Tensor) -> Tensor:
        """Compute float32 logits, (N, num_classes), of preprocessed uint8 images."""
        return self.network(normalize(images, self.record.preprocessing))[0]

    def predict(self, image: ImageSource, top_k: int = 3) -> Prediction:
        """Load, preprocess and classify one image; see `predict_batch` for the rules."""
        return self.predict_batch(self.preprocess(image).unsqueeze(0), top_k)[0]

    def predict_batch(self, images: Tensor, top_k: int = 3) -> list[Prediction]:
        """Classify preprocessed images, uint8 (N, 3, crop, crop).

        Raises:
            ValueError: top_k below 1 or above the number of classes.
        """
        if not 1 <= top_k <= len(self.classes):
            raise ValueError(f"top_k must be 1 to {len(self.classes)}, not {top_k}")
        logits, pooled = self.network(normalize(images, self.record.preprocessing))
        probabilities = (logits / self.decision.temperature).softmax(dim=1)
        similarities = nearest_centroid(pooled, self.centroids).tolist()
        top = probabilities.topk(top_k, dim=1)
        return [
            self._prediction(values, indices, similarity)
            for values, indices, similarity in zip(
                top.values.tolist(), top.indices.tolist(), similarities, strict=True
            )
        ]

    def _prediction(self, values: list[float], indices: list[int], similarity: float) -> Prediction:
        top = [ClassProbability(self.classes[i], p) for i, p in zip(indices, values, strict=True)]
        if similarity < self.decision.food_at:
            return Prediction(top, "not_food")
        is_sure = values[0] >= self.decision.confident_at
        return Prediction(top, "confident" if is_sure else "unsure")


def load_model_for_inference(
    model_dir: str | Path,
    version: int | None = None,
    device: str | torch.device | None = None,
    *,
    num_threads: int | None = None,
    runtime: Runtime | Literal["auto"] = "auto",
) -> FoodPredictor:
    """Load a released model (the current version, unless one is named) and check all its files.

    device: where to compute; the CPU if not given. num_threads: cores for one call, all that this
    process may use if not given; PyTorch has one such number for the whole process, which is left
    alone. runtime: "onnx" and "int8" compute on the CPU; "auto" takes the fastest there, as
    `fastest` measures it, and PyTorch on other devices.

    Raises:
        NoModelError: nothing released in model_dir, or not that version, or not in that form.
        DamagedArtifactError: a file is missing, changed, or does not fit the others.
    """
    model_dir, device = Path(model_dir), torch.device(device or "cpu")
    record = read_record(model_dir, version)
    forms = forms_of(record)
    if runtime == "auto":
        on_cpu: list[Runtime] = [form for form in forms if form != "torch"]
        candidates = on_cpu if on_cpu and device.type == "cpu" else forms[:1]
    elif runtime in forms:
        candidates = [runtime]
    else:
        raise NoModelError(
            f"version {record.version} in {model_dir} has no {runtime} form; "
            f"it has: {', '.join(forms)}"
        )
    return fastest([_load_form(model_dir, record, c, device, num_threads) for c in candidates])


def forms_of(record: ModelRecord) -> list[Runtime]:
    """List the runtimes for which the version has a form."""
    return [
        runtime
        for runtime, suffix in FORM_SUFFIXES.items()
        if file_name(record.version, suffix) in record.sha256
    ]


def _load_form(
    model_dir: Path,
    record: ModelRecord,
    runtime: Runtime,
    device: torch.device,
    num_threads: int | None,
) -> FoodPredictor:
    network: TorchNetwork | OnnxNetwork
    if runtime == "torch":
        network = TorchNetwork(build_released(model_dir, record), record.model_name, device)
    else:
        name = file_name(record.version, FORM_SUFFIXES[runtime])
        network = OnnxNetwork(read_checked(model_dir, name, record), num_threads)
    return FoodPredictor(record, network, read_centroids(model_dir, record, runtime), runtime)


def fastest(predictors: list[FoodPredictor]) -> FoodPredictor:
    """Return the one whose network answers one image fastest; the first, unless one is clearly so.

    Which form that is depends on the CPU's instructions: without those for 8-bit integers (AVX-512
    VNNI, AMX, ARM's dot product) INT8 may be the slowest.
    """
    best = predictors[0]
    if len(predictors) > 1:
        seconds = seconds_per_image(predictors)
        for predictor in predictors[1:]:
            if seconds[predictor.runtime] * CLEARLY_FASTER < seconds[best.runtime]:
                best = predictor
    return best


def seconds_per_image(predictors: list[FoodPredictor]) -> dict[Runtime, float]:
    """Time each network on one image, in turn; the shortest times, as what else the machine does
    only adds to them."""
    crop = predictors[0].record.preprocessing.crop
    image = torch.zeros(1, 3, crop, crop)
    times: dict[Runtime, list[float]] = {predictor.runtime: [] for predictor in predictors}
    for predictor in predictors:
        predictor.network(image)  # the first call is slower
    began, calls = time.perf_counter(), 0
    while calls < TIMED_CALLS or time.perf_counter() - began < TIMED_SECONDS * len(predictors):
        calls += 1
        for predictor in predictors:
            called = time.perf_counter()
            predictor.network(image)
            times[predictor.runtime].append(time.perf_counter() - called)
    return {runtime: min(measured) for runtime, measured in times.items()}


def predict_image(
    model: FoodPredictor, image: ImageSource, top_k: int = 3
) -> list[ClassProbability]:
    """Return the top_k classes of an image (path, bytes or PIL image), most probable first."""
    return model.predict(image, top_k).top


def build_released(model_dir: Path, record: ModelRecord) -> torch.nn.Module:
    """Build the plain network of a version; its head must be as wide as the class map.

    Raises:
        ArtifactError: its weights are missing or damaged, or do not fit.
    """
    state = read_state(model_dir, record)
    try:
        model = build_model(record.model_name, len(record.class_to_idx))
    except ValueError as error:  # one of timm's that the timm of today does not have
        raise DamagedArtifactError(
            f"version {record.version} in {model_dir} cannot be built: {error}; it was made with "
            f"timm {record.libraries.get('timm')}, which can be installed beside this code"
        ) from error
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise DamagedArtifactError(
            f"the weights of version {record.version} in {model_dir} do not fit a "
            f"{record.model_name} with {head_linear(model, record.model_name).out_features} "
            f"classes: {error}"
        ) from error
    return model


def nearest_centroid(pooled: Tensor, centroids: Tensor) -> Tensor:
    """Return each image's cosine similarity to the nearest class: (N, F), (C, F) -> (N,).

    Of the scores tried (energy, largest logit, largest probability, feature norm, k nearest
    neighbors, Mahalanobis distance) this is the simplest that tells food from other things.
    """
    return (torch.nn.functional.normalize(pooled, dim=1) @ centroids.T).amax(dim=1)


class TorchNetwork:
    """The network in PyTorch, batch-norm folded, channels_last; gives logits and features."""

    def __init__(self, model: torch.nn.Module, model_name: str, device: torch.device) -> None:
        self.device = device
        network, size = ServedNetwork(model, model_name), backbone(model_name).preprocessing["crop"]
        self.model = inference_copy(network, device, torch.float32, size)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # Grad mode is per thread, so it is switched off in the call, not once at start.
        with torch.inference_mode():
            images = images.to(self.device, memory_format=torch.channels_last)
            logits, pooled = self.model(images)
            return logits.cpu(), pooled.cpu()


def import_onnxruntime() -> Any:
    """Import onnxruntime with its telemetry off; whoever needs it gets it from here.

    It writes a device id under ~/.cache and reports to its maker, unless this variable is set
    before the import.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime  # a server of the PyTorch form does without

    return onnxruntime


def has_vnni() -> bool:
    """Whether the CPU, if it is an x86, adds products of 8-bit integers in 32 bits at once."""
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_vnni") or features.get("avx_vnni"))


def open_session(model: bytes, num_threads: int) -> Any:
    """Open an ONNX file in onnxruntime, on the CPU."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # plain text on stderr, while errors are raised
    options.intra_op_num_threads = num_threads
    # Threads that spin between answers would take the cores that others need; between the layers
    # of one they save waking up, a fifth of an INT8 answer.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # A CPU without VNNI adds pairs of 8-bit products in 16 bits, which overflow: there it uses a
    # slower way that does not, so that answers match; with VNNI that would take 2.5 times as long.
    may_overflow = "0" if has_vnni() else "1"
    options.add_session_config_entry("session.x64quantprecision", may_overflow)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_session(session: Any, images: Tensor) -> list[Tensor]:
    """Return what a session computes from images (N, 3, H, W).

    Raises:
        MemoryError: there is not enough; onnxruntime says so in errors without a common base.
    """
    try:
        outputs = session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(images)})
    except Exception as error:
        if any(words in str(error) for words in OUT_OF_MEMORY):
            raise MemoryError(str(error)) from error
        raise
    return [torch.from_numpy(output) for output in outputs]


class OnnxNetwork:
    """The network in onnxruntime, on the CPU; gives logits and features."""

    def __init__(self, model: bytes, num_threads: int | None) -> None:
        self.session: Any = open_session(model, num_threads or num_cores())

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, pooled = run_session(self.session, images)
        return logits, pooled
