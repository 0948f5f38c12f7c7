"""What a trained model answers on each split, in each form whose answers are its own.

The validation photos fit how logits become an answer and decide which forms are released; the test
photos are looked at once, and only reported.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from app.ml.artifacts import Decision, SaveError, reason_of
from app.ml.drift import AnswerSummary, sum_up
from app.ml.forms import Runtime
from app.ml.predictor import OnnxNetwork, TorchNetwork, nearest_centroid
from app.ml.preprocessing import PreprocessConfig, normalize
from training.compute.memory import is_out_of_memory
from training.compute.quantization import CALIBRATION_IMAGES
from training.config import TrainingConfig
from training.data.loader import eval_loader
from training.data.splits import FoodData, Split
from training.release.calibration import (
    VerdictShare,
    class_centroids,
    fit_decision,
    given_answers,
    verdict_shares,
)
from training.release.export import FORMS, FormFiles, Source, export_forms
from training.release.metrics import (
    PairedTest,
    PredictionRow,
    Results,
    evaluate,
    prediction_rows,
)

EVAL_BATCH_SIZE = 16  # no slower than 64 on a CPU, where it takes a quarter of the memory
CENTROID_IMAGES = 30  # of each class, to find its center; 20 to 100 tell food apart equally well
WORST_LOSS = 0.01  # of validation accuracy, that a form with answers of its own may cost
PLAIN: Runtime = "torch"  # whose answers every form gives that has none of its own

logger = logging.getLogger(__name__)
Network = TorchNetwork | OnnxNetwork


@dataclass(frozen=True)
class Predictions:
    """What a network gives for a split's readable images.

    paths: N. labels: (N,). logits: (N, C). pooled: (N, num_features), what the head saw.
    """

    paths: list[str]
    labels: np.ndarray
    logits: np.ndarray
    pooled: Tensor
    skipped: dict[str, str]

    @property
    def hits(self) -> np.ndarray:
        """Which images are answered correctly: bool (N,)."""
        is_hit: np.ndarray = self.logits.argmax(axis=1) == self.labels
        return is_hit

    def scored(self, centroids: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return logits, labels and the similarity to the nearest centroid, (N,)."""
        return self.logits, self.labels, nearest_centroid(self.pooled, centroids).numpy()


class FormComparison(PairedTest):
    """The validation images answered by the plain network and by another form of it."""

    def __str__(self) -> str:
        points, answers = 100 * self.change, "answer" if self.gained == 1 else "answers"
        return (
            f"{points:+.1f} points against the plain network on {self.total} validation images "
            f"({self.gained} {answers} gained, {self.lost} lost, p = {self.p_value:.2g})"
        )

    @property
    def is_worse(self) -> bool:
        """Whether the other form loses more than it may, or more than chance explains."""
        return self.change < -WORST_LOSS or super().is_worse


class Fit(NamedTuple):
    """What the validation images gave for one form.

    comparison: with the plain network; None for itself.
    """

    decision: Decision
    centroids: Tensor
    comparison: FormComparison | None = None


@dataclass(frozen=True)
class FormEvaluation:
    """What calibration and the test found of one form's answers."""

    fit: Fit
    results: Results
    verdicts: dict[str, dict[str, VerdictShare]]
    validation: AnswerSummary


@dataclass(frozen=True)
class Evaluation:
    """All that is released beside the weights.

    plain: of the network as trained. own: of the forms with answers of their own that are good
    enough. missing: why the other ones are not released. rows: of the plain network.
    seconds: what each phase took.
    """

    preprocessing: PreprocessConfig
    forms: FormFiles
    plain: FormEvaluation
    own: dict[Runtime, FormEvaluation]
    missing: dict[Runtime, str]
    rows: list[PredictionRow]
    skipped: dict[str, str]
    seconds: dict[str, float]


@dataclass
class Stopwatch:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        began = perf_counter()
        yield
        self.seconds[phase] = perf_counter() - began


# The job --------------------------------------------------------------------------------------


def evaluate_model(
    model: nn.Module, data: FoodData, config: TrainingConfig, num_workers: int, device: torch.device
) -> Evaluation:
    """Write the model in each form, fit how logits become an answer, choose the forms, test once.

    Raises:
        SaveError: a form cannot be written, a split has no readable image, or memory is short.
    """
    preprocessing, classes = config.preprocessing, data.classes
    watch = Stopwatch()

    def predicted(split: Split) -> dict[Runtime, Predictions]:
        return answers_of(networks, split, preprocessing, num_workers, device)

    with _memory_shortage_explained():
        with watch.timed("writing the forms"):
            logger.info("writing the model for %s", ", ".join(FORMS))
            paths = some_of(data.train, CALIBRATION_IMAGES, config.seed)
            images = read_images(paths, preprocessing, num_workers)
            forms, missing = export_forms(Source(model, config.model_name, preprocessing, images))
            networks = own_networks(forms, missing, normalize(images[:1], preprocessing))
            networks[PLAIN] = plain_network(model, config.model_name, forms, device)
        with watch.timed("calibration"):
            logger.info("calibrating on %d validation images", len(data.val))
            known, val = predicted(some_of_each(data.train)), predicted(data.val)
            fits = fit_all(known, val, len(classes), missing)
            networks = {name: networks[name] for name in fits}
        with watch.timed("test"):
            logger.info("testing on %d images", len(data.test))
            test = predicted(data.test)
            tested = {name: tested_form(fits[name], val, test, name, classes) for name in fits}
    plain = tested.pop(PLAIN)
    answers = test[PLAIN]
    return Evaluation(
        preprocessing=preprocessing,
        forms={runtime: data for runtime, data in forms.items() if runtime not in missing},
        plain=plain,
        own=tested,
        missing=missing,
        rows=prediction_rows(
            answers.paths, answers.labels, answers.logits, classes, plain.fit.decision.temperature
        ),
        skipped={**val[PLAIN].skipped, **answers.skipped},
        seconds=watch.seconds,
    )


@contextlib.contextmanager
def _memory_shortage_explained() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise SaveError("not enough memory to test the model; free some, or add swap") from error


# Networks and their answers -------------------------------------------------------------------


def plain_network(
    model: nn.Module, model_name: str, forms: FormFiles, device: torch.device
) -> Network:
    """Return the network as trained, in what computes it fastest."""
    if device.type == "cpu" and "onnx" in forms:
        return OnnxNetwork(bytes(forms["onnx"]), None)
    return TorchNetwork(model, model_name, device)


def own_networks(
    forms: FormFiles, missing: dict[Runtime, str], images: Tensor
) -> dict[Runtime, Network]:
    """Load the forms whose answers are their own; one that fails on images joins the missing."""
    networks: dict[Runtime, Network] = {}
    for runtime, data in forms.items():
        if FORMS[runtime].has_own_answers:
            try:
                network = OnnxNetwork(bytes(data), None)
                network(images)
            except Exception as error:  # noqa: BLE001 (onnxruntime's have no other base)
                missing[runtime] = f"it cannot be run: {reason_of(error)}"
            else:
                networks[runtime] = network
    return networks


def predict_split(
    network: Network,
    split: Split,
    config: PreprocessConfig,
    num_workers: int,
    device: torch.device,
) -> Predictions:
    """Let one network answer; see `answers_of`."""
    return answers_of({PLAIN: network}, split, config, num_workers, device)[PLAIN]


def answers_of(
    networks: Mapping[Runtime, Network],
    split: Split,
    config: PreprocessConfig,
    num_workers: int,
    device: torch.device,
) -> dict[Runtime, Predictions]:
    """Let each network answer every image as serving would, in the order of the split.

    Raises:
        SaveError: none of the images can be read.
    """
    loader = eval_loader(split.paths, config, EVAL_BATCH_SIZE, num_workers, device)
    indices: list[Tensor] = []
    outputs: dict[Runtime, list[tuple[Tensor, Tensor]]] = {name: [] for name in networks}
    with contextlib.closing(loader):
        for batch in loader:
            if len(batch.indices):
                indices.append(batch.indices)
                images = normalize(batch.images, config)
                for name, network in networks.items():
                    outputs[name].append(network(images))
    if not indices:
        raise nothing_read(split.paths)
    order = torch.cat(indices).numpy()
    return {
        name: Predictions(
            paths=[split.paths[i] for i in order],
            labels=split.labels[order],
            logits=torch.cat([logits for logits, _ in parts]).numpy(),
            pooled=torch.cat([pooled for _, pooled in parts]),
            skipped=loader.skipped,
        )
        for name, parts in outputs.items()
    }


def some_of_each(split: Split) -> Split:
    """Take at most `CENTROID_IMAGES` images of each class, the first of the split."""
    chosen = [np.flatnonzero(split.labels == c)[:CENTROID_IMAGES] for c in np.unique(split.labels)]
    indices = np.sort(np.concatenate(chosen))
    return Split(tuple(split.paths[i] for i in indices), split.labels[indices])


def some_of(split: Split, number: int, seed: int) -> tuple[str, ...]:
    """Choose some images of a split, the same ones for a seed."""
    chosen = np.random.default_rng(seed).permutation(len(split))[:number]
    return tuple(split.paths[i] for i in np.sort(chosen))


def read_images(paths: tuple[str, ...], config: PreprocessConfig, num_workers: int = 0) -> Tensor:
    """Read all that can be read of some images: uint8 (N, 3, crop, crop).

    Raises:
        SaveError: none of them can.
    """
    cpu = torch.device("cpu")
    loader = eval_loader(paths, config, EVAL_BATCH_SIZE, num_workers, cpu)
    with contextlib.closing(loader):
        images = torch.cat([batch.images for batch in loader])
    if not len(images):
        raise nothing_read(paths)
    return images


def nothing_read(paths: Sequence[str]) -> SaveError:
    return SaveError(f"none of {len(paths)} images can be read, e.g. {paths[0]}; put them back")


# Judging a form -------------------------------------------------------------------------------


def fit_all(
    known: Mapping[Runtime, Predictions],
    val: Mapping[Runtime, Predictions],
    num_classes: int,
    missing: dict[Runtime, str],
) -> dict[Runtime, Fit]:
    """Fit each network's decision; a form that is not good enough joins the missing instead."""
    fits = {PLAIN: fitted(known[PLAIN], val[PLAIN], num_classes)}
    for runtime in FORMS:
        if runtime in val and runtime != PLAIN:
            try:
                fit = fitted(known[runtime], val[runtime], num_classes)
            except ValueError as error:
                missing[runtime] = f"its answers cannot be used: {reason_of(error)}"
                continue
            comparison = compared(val[PLAIN], val[runtime])
            if comparison.is_worse:
                missing[runtime] = str(comparison)
            else:
                logger.info("%s form: %s", runtime, comparison)
                fits[runtime] = fit._replace(comparison=comparison)
    for runtime, reason in missing.items():
        logger.info("no %s form: %s", runtime, reason)
    return fits


def fitted(known: Predictions, val: Predictions, num_classes: int) -> Fit:
    """Find the class centers, and fit on the validation images how logits become an answer.

    Raises:
        ValueError: the logits are not finite.
    """
    centroids = class_centroids(known.pooled, known.labels, num_classes)
    return Fit(fit_decision(*val.scored(centroids)), centroids)


def compared(plain: Predictions, other: Predictions) -> FormComparison:
    """Compare two networks' answers to the same images."""
    return FormComparison.of(plain.hits, other.hits)


def tested_form(
    fit: Fit,
    val: Mapping[Runtime, Predictions],
    test: Mapping[Runtime, Predictions],
    name: Runtime,
    classes: list[str],
) -> FormEvaluation:
    """Score a form on the test images."""
    decision, answers = fit.decision, test[name]
    scored = {
        "validation": val[name].scored(fit.centroids),
        "test": answers.scored(fit.centroids),
    }
    return FormEvaluation(
        fit=fit,
        results=evaluate(answers.logits, answers.labels, classes, temperature=decision.temperature),
        verdicts={split: verdict_shares(decision, *values) for split, values in scored.items()},
        validation=sum_up(*given_answers(decision, *scored["validation"])),
    )
