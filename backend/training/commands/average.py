"""One version from several: the mean of the weights of runs that share a pretrained start.

Fine-tunes of the same start lie in one valley of the loss, so the mean of their weights is itself a
good network, often better than each (Wortsman et al. 2022, arXiv:2203.05482). It is made greedily:
the best version first, then each with which the mean holds its own on validation photos.
"""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from app.ml.artifacts import ArtifactError, ModelRecord, read_record, read_state, weights_name
from app.ml.model import build_model
from app.ml.predictor import TorchNetwork
from training.compute.devices import choose_device, prepare_machine
from training.compute.distributed import asked_world_size
from training.config import TrainingConfig, config_of_record
from training.data.loader import chosen_num_workers
from training.data.manifest import MANIFEST_NAME, read_manifest
from training.data.splits import FoodData, Split
from training.errors import CheckpointError, ConfigError
from training.release.evaluation import predict_split
from training.release.metrics import PairedTest, evaluate
from training.release.release import Averaged, TrainingResult, release_model
from training.run.record import recording_mean
from training.run.resume import finished_version

MIN_VALIDATION = 100  # photos that no parent was trained on, if there are so many
MUST_AGREE = ("model_name", "weights", "freeze_layers")  # settings of versions that share a start

State = dict[str, Tensor]
Train = Callable[[TrainingConfig, str], ModelRecord | None]

logger = logging.getLogger(__name__)


class AverageError(ArtifactError):
    """Versions that have no mean; the message says why."""


def train_and_average(train: Train, config: TrainingConfig, command: str) -> ModelRecord | None:
    """Train `config.runs` times on the same split, with a seed each, and release the mean.

    With --resume auto, what is finished is not trained again.

    Raises:
        ConfigError: under torchrun, or with the checkpoint of one run.
        TrainingError: WORLD_SIZE makes no sense.
    """
    if asked_world_size() > 1:
        raise ConfigError(f"--runs {config.runs}: one process trains them; leave torchrun out")
    if config.resume not in (None, "auto"):
        raise ConfigError(f"--runs {config.runs} with --resume {config.resume}: must be auto")
    versions = []
    for number in range(config.runs):
        seed = config.seed + number
        one = dataclasses.replace(config, seed=seed, split_seed=config.seed if number else None)
        version = finished_version(one) if config.resume else None
        if version is None:
            logger.info("run %d of %d, seed %d", number + 1, config.runs, seed)
            released = train(one, command)
            assert released, "one process alone trains several runs"
            version = released.version
        versions.append(version)
    return average_versions(config, versions, command, config.tracking_uri)


def average_versions(
    config: TrainingConfig, versions: Sequence[int], command: str, tracking_uri: str | None
) -> ModelRecord | None:
    """Release the mean of the versions with which it holds; None if the best one stays alone.

    tracking_uri: of MLflow; None for that of the first version, unless it was trained without.

    Raises:
        ArtifactError: a version is missing or damaged, they do not share a start, their photos are
            gone or were partly trained on, or the mean cannot be saved.
    """
    records = [read_record(config.output_dir, version) for version in dict.fromkeys(versions)]
    check_alike(records)
    data = photos_of(records, config.checkpoint_dir)
    prepare_machine()
    device = choose_device(config.device, 0)
    num_workers = chosen_num_workers(config.num_workers, device)
    settings = settings_of_mean(records[0], config, tracking_uri)
    name = name_of_mean(records)
    with recording_mean(name, settings, data, device) as end:
        soup = greedy_soup(records, data, settings, num_workers, device)
        if len(soup.parents) == 1:
            logger.info("v%d alone is the best on validation; nothing is released", *soup.parents)
            end.status = "FINISHED"
            return None
        model = build_model(settings.model_name, len(data.class_to_idx))
        model.load_state_dict(soup.state)
        result = result_of(soup, name, command, settings, num_workers)
        released = release_model(model, data, result, device)
        end.finish(released)
    return released


def result_of(
    soup: "Soup", name: str, command: str, config: TrainingConfig, num_workers: int
) -> TrainingResult:
    """Collect what the release says about a mean, which has no epochs of its own."""
    return TrainingResult(
        run_name=name,
        command=command,
        config=config,
        history=[],
        best_epoch=0,
        stopped_early=False,
        skipped={},
        num_workers=num_workers,
        averaged=Averaged(soup.parents, soup.val_acc, soup.val_loss),
    )


def settings_of_mean(
    first: ModelRecord, config: TrainingConfig, tracking_uri: str | None
) -> TrainingConfig:
    """Take the settings of the first version; of the command, where things go."""
    then = config_of_record(first.training)
    return dataclasses.replace(
        then,
        output_dir=config.output_dir,
        checkpoint_dir=config.checkpoint_dir,
        no_promote=config.no_promote,
        no_mlflow=config.no_mlflow or (then.no_mlflow and not tracking_uri),
        tracking_uri=tracking_uri or then.tracking_uri,
    ).with_sizes(sizes_of_record(first))


def name_of_mean(records: Sequence[ModelRecord]) -> str:
    """Name the run that averages these versions: the same each time, and unlike other folders'."""
    weights = "".join(record.sha256[weights_name(record.version)] for record in records)
    numbers = "-".join(f"v{record.version}" for record in records)
    return f"average-{numbers}-{hashlib.sha256(weights.encode()).hexdigest()[:4]}"


def check_alike(records: Sequence[ModelRecord]) -> None:
    """Refuse versions whose weights have no meaning together.

    Raises:
        AverageError: it names the first that differs, and how.
    """
    first = records[0]
    if len(records) < 2:
        raise AverageError(f"--average v{first.version}: at least two versions are needed")
    for record in records:
        names = f"v{first.version} and v{record.version}"
        if parents := record.training.get("parents"):
            ways = " ".join(f"v{version}" for version in parents)
            raise AverageError(f"v{record.version} is a mean itself; name its parents: {ways}")
        if record.class_to_idx != first.class_to_idx:
            raise AverageError(f"{names} know other classes; average versions of the same ones")
        if record.preprocessing != first.preprocessing:
            raise AverageError(f"{names} see pictures at other sizes; average versions that agree")
        for key in MUST_AGREE:
            ours, theirs = (_setting(r.training, key) for r in (first, record))
            if ours != theirs:
                raise AverageError(
                    f"{names} do not share a start: {key} is {ours}, {theirs}; average versions "
                    "that do"
                )
        if record.training.get("weights") == "none":
            raise AverageError(
                f"v{record.version} was trained from random weights, which share nothing; average "
                "versions with a pretrained start"
            )


def _setting(training: dict[str, Any], key: str) -> object:
    value = training.get(key)
    return Path(str(value)).name if key == "weights" else value  # the file may have moved


def sizes_of_record(record: ModelRecord) -> dict[str, int]:
    """Return the picture sizes of a version."""
    crop, resize = record.preprocessing.crop, record.preprocessing.resize
    train_crop = record.training.get("train_crop", crop)
    return {
        "first_crop": record.training.get("first_crop", train_crop),
        "train_crop": train_crop,
        "test_resize": resize,
        "test_crop": crop,
    }


# Photos ---------------------------------------------------------------------------------------


def photos_of(records: Sequence[ModelRecord], checkpoint_dir: Path) -> FoodData:
    """List photos to choose by and to test with that no version was trained on.

    checkpoint_dir: where the folders of the runs are, unless they are where they were.

    Raises:
        AverageError: a run's list of images is missing, or too few photos are left.
    """
    parents = [photos_of_version(record, checkpoint_dir) for record in records]
    trained_on = {path for data in parents for path in data.train.paths}
    val = _without([data.val for data in parents], trained_on)
    test = _without([data.test for data in parents], trained_on | set(val.paths))
    needed = min(MIN_VALIDATION, *(len(data.val) for data in parents))
    if len(val) < needed or not len(test):
        names = ", ".join(f"v{record.version}" for record in records)
        raise AverageError(
            f"{names} were trained on one another's validation photos: of these {len(val)} are "
            f"left, {needed} are needed; --runs {len(records)} trains versions that share them"
        )
    return dataclasses.replace(parents[0], val=val, test=test)


def photos_of_version(record: ModelRecord, checkpoint_dir: Path) -> FoodData:
    """List the photos that a version was trained and tested on; see `photos_of`."""
    run = str(record.training.get("run"))
    there = checkpoint_dir / run
    run_dir = there if there.exists() else Path(str(record.training.get("checkpoint_dir"))) / run
    try:
        return read_manifest(run_dir)
    except CheckpointError as error:
        raise AverageError(
            f"the photos of v{record.version} are not known: {run_dir / MANIFEST_NAME} cannot be "
            "read; put the folder of its run back"
        ) from error


def _without(splits: Sequence[Split], paths: set[str]) -> Split:
    """Join splits, each photo once, without those of these paths."""
    labels = {
        path: label
        for split in splits
        for path, label in zip(split.paths, split.labels.tolist(), strict=True)
        if path not in paths
    }
    return Split(tuple(labels), np.array(list(labels.values()), dtype=np.int64))


# The mean -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Soup:
    """A mean of weights, the versions in it, and what it reaches on validation.

    hits: which of the images it answers correctly, bool (N,).
    """

    state: State
    parents: tuple[int, ...]
    hits: np.ndarray
    val_loss: float

    @property
    def val_acc(self) -> float:
        return float(self.hits.mean())

    def holds_against(self, best: "Soup") -> bool:
        """Whether it is not worse than another by more than one standard error.

        As good is good enough: validation chose the parents' epochs, which flatters them, and not
        the mean. The losses say nothing here, as the mean is less certain until it is calibrated.
        """
        test = PairedTest.of(best.hits, self.hits)
        return test.lost - test.gained <= math.sqrt(test.lost + test.gained)


def greedy_soup(
    records: Sequence[ModelRecord],
    data: FoodData,
    config: TrainingConfig,
    num_workers: int,
    device: torch.device,
) -> Soup:
    """Begin with the best version; add each, the better ones first, with which the mean holds."""
    network = build_model(config.model_name, len(data.class_to_idx))

    def measured(state: State, parents: tuple[int, ...]) -> Soup:
        network.load_state_dict(state)
        soup = Soup(state, parents, *validate(network, data, config, num_workers, device))
        names = " + ".join(f"v{version}" for version in parents)
        logger.info(
            "validation of %s: accuracy %.4f, loss %.4f", names, soup.val_acc, soup.val_loss
        )
        return soup

    states = {r.version: read_state(config.output_dir, r) for r in records}
    alone = [measured(state, (version,)) for version, state in states.items()]
    best, *others = sorted(alone, key=lambda soup: (-soup.val_acc, soup.val_loss))
    soup = best
    for other in others:
        parents = (*soup.parents, *other.parents)
        mixed = measured(mean_of([states[version] for version in parents]), parents)
        if mixed.holds_against(best):
            soup = mixed
    return soup


def mean_of(states: Sequence[State]) -> State:
    """Average tensors of floats, in float64; take counters from the first."""
    return {
        name: torch.stack([state[name].double() for state in states]).mean(dim=0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in states[0].items()
    }


def validate(
    model: nn.Module, data: FoodData, config: TrainingConfig, num_workers: int, device: torch.device
) -> tuple[np.ndarray, float]:
    """Return which validation photos are answered correctly, bool (N,), and the loss."""
    network = TorchNetwork(model, config.model_name, device)
    found = predict_split(network, data.val, config.preprocessing, num_workers, device)
    results = evaluate(found.logits, found.labels, data.classes)
    return found.hits, results["loss"]
