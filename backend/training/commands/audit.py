"""Photos whose labels to doubt: on a page where a person decides, and as a table.

The photos of all splits are looked at once, by the pretrained network as it is; which labels do not
fit follows from its pooled features, see `training.release.label_audit`.
"""

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from app.ml.activation import ActivationMap, SpatialNetwork, as_grid, seen_side
from app.ml.model import build_model
from app.ml.predictor import TorchNetwork
from app.ml.preprocessing import EvalTransform, PreprocessConfig, normalize
from training.compute.devices import choose_device, prepare_machine
from training.compute.distributed import losses_explained
from training.config import TrainingConfig
from training.data.folders import join_names
from training.data.labels import DROP, check_no_class_is_drop, name_in_labels, read_labels
from training.data.loader import chosen_num_workers, eval_loader
from training.data.manifest import SPLITS
from training.data.splits import FoodData, folders_of
from training.errors import ConfigError, DataError
from training.release.evaluation import EVAL_BATCH_SIZE
from training.release.label_audit import (
    MIN_PHOTOS,
    Doubts,
    difference_hash,
    directions,
    doubt_labels,
    far_out,
    place_evidence,
    same_pictures,
)
from training.release.pictures import Look, picture_of, whole
from training.release.report import write_page
from training.release.tables import write_table
from training.run.start import load_start

PAGE_NAME, TABLE_NAME = "audit.html", "audit.csv"
COLUMNS = ["path", "label", "suggestion", "label_probability", "split", "kind", "why"]
SHOWN = 400  # photos on the page, about 15 kB each; the table has all of them
SUGGESTIONS, LIKELY = 3, 0.01  # classes to choose from by a key, and their least probability
# The order on the page: what is certainly wrong, what is likely wrong, what may be left out.
CONFLICT, LABEL, NO_FOOD, TWICE = "conflict", "label", "no_food", "twice"
KINDS = (CONFLICT, LABEL, NO_FOOD, TWICE)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Photos:
    """All photos that could be read. pooled: (N, num_features); hashes: bool (N, 64)."""

    paths: list[str]
    names: list[str]
    labels: np.ndarray
    splits: list[str]
    pooled: np.ndarray
    hashes: np.ndarray


@dataclass
class Finding:
    """A photo to look at. suggestion: a class, or `DROP`. likely: the most probable other classes,
    with their probability. twins: photos of the same picture. weight: see `Doubts.weight`."""

    photo: int
    kind: str
    suggestion: str
    label_probability: float
    likely: dict[str, float]
    reasons: list[str] = field(default_factory=list)
    twins: list[int] = field(default_factory=list)
    weight: np.ndarray | None = None


def audit_labels(config: TrainingConfig, data: FoodData) -> Path:
    """List the photos to look at on a page and in a table; return the page.

    Raises:
        ConfigError: the network cannot be built. WeightsError: its weights are not available.
        DataError: no photo can be read, a class is called `drop`, or the page cannot be written.
    """
    check_no_class_is_drop(data.classes)
    model = pretrained_model(config, data)
    photos = read_photos(model, config, data)
    reviewed = read_labels(config.labels) if config.labels else {}
    findings = [
        finding
        for finding in find(photos, data.classes, config.seed)
        if reviewed.keys().isdisjoint((photos.names[finding.photo], photos.paths[finding.photo]))
    ]
    for line in _summary(findings, photos, data.classes):
        logger.info("%s", line)
    page = config.output_dir / PAGE_NAME
    rows = _rows(findings, photos, data.classes)
    cards = _cards(findings[:SHOWN], photos, data.classes, model, config)
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        write_table(config.output_dir / TABLE_NAME, COLUMNS, rows)
        write_page(
            page,
            "audit.html",
            cards=cards,
            has_heat=any(card["heat"] for card in cards),
            num_found=len(findings),
            num_photos=len(photos.paths),
            source=data.audit["source"],
            model_name=config.model_name,
            classes=data.classes,
            before=reviewed,
            drop=DROP,
        )
    except OSError as error:
        raise DataError(f"{page} cannot be written ({error.strerror}); see --output_dir") from error
    return page


# What the network sees ------------------------------------------------------------------------


def pretrained_model(config: TrainingConfig, data: FoodData) -> nn.Module:
    """Build the network that looks at the photos.

    Raises:
        ConfigError: it cannot be built. WeightsError: its weights are not available.
    """
    torch.manual_seed(config.seed)
    try:
        model = build_model(config.model_name, len(data.class_to_idx))
    except ValueError as error:  # a network of timm that cannot be cut
        raise ConfigError(f"--model_name {config.model_name}: {error}") from error
    logger.info("%s, %s", config.model_name, load_start(model, config, data.class_to_idx))
    if not config.is_pretrained:
        logger.warning("an untrained network tells dishes apart badly; leave --weights none out")
    return model


def read_photos(model: nn.Module, config: TrainingConfig, data: FoodData) -> Photos:
    """Look at each photo of each split once."""
    splits = {name: getattr(data, name) for name in SPLITS}
    paths = [path for split in splits.values() for path in split.paths]
    labels = np.concatenate([split.labels for split in splits.values()])
    split_of = [name for name, split in splits.items() for _ in split.paths]
    indices, pooled, hashes = _looked_at(model, tuple(paths), config)
    folders, places = folders_of(config.source_dir, config.custom_data_dir), set(paths)
    return Photos(
        paths=[paths[i] for i in indices],
        names=[name_in_labels(paths[i], folders, places) for i in indices],
        labels=labels[indices],
        splits=[split_of[i] for i in indices],
        pooled=pooled,
        hashes=hashes,
    )


def _looked_at(
    model: nn.Module, paths: tuple[str, ...], config: TrainingConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the indices of the readable photos, their features and their hashes."""
    device = choose_device(config.device, 0)
    prepare_machine()
    network = TorchNetwork(model, config.model_name, device)
    workers = chosen_num_workers(config.num_workers, device)
    loader = eval_loader(paths, config.preprocessing, EVAL_BATCH_SIZE, workers, device)
    indices, pooled, hashes = [], [], []
    bar = tqdm(total=len(paths), unit=" images", disable=None, leave=False)
    with contextlib.closing(loader), losses_explained(hint=""), logging_redirect_tqdm(), bar:
        for batch in loader:
            if len(batch.indices):
                indices.append(batch.indices.numpy())
                pooled.append(network(normalize(batch.images, config.preprocessing))[1].numpy())
                hashes.append(difference_hash(batch.images))
            bar.update(EVAL_BATCH_SIZE)
    if not indices:
        raise DataError(f"none of {len(paths):,} photos can be read, e.g. {paths[0]}")
    return np.concatenate(indices), np.concatenate(pooled), np.concatenate(hashes)


# What to look at ------------------------------------------------------------------------------


def find(photos: Photos, classes: Sequence[str], seed: int) -> list[Finding]:
    """List the photos to look at, the most suspicious first."""
    logger.info("looking for copies and wrong labels among %s photos", f"{len(photos.paths):,}")
    features = directions(photos.pooled)
    groups = same_pictures(features, photos.hashes)
    doubts = doubt_labels(features, photos.labels, len(classes), groups, seed)
    findings = Findings(photos, classes, doubts)
    for same in _groups(groups):
        findings.add_copies(same)
    for photo in np.flatnonzero(doubts.is_error).tolist():
        best = classes[int(doubts.probabilities[photo].argmax())]
        findings.add(photo, LABEL, best, f"looks like {best}")
    for photo in np.flatnonzero(far_out(features, photos.labels, len(classes))).tolist():
        findings.add(photo, NO_FOOD, DROP, "resembles no dish of the data")
    found = findings.in_order()
    for finding in found:
        if finding.suggestion != DROP:
            label, other = photos.labels[finding.photo], classes.index(finding.suggestion)
            finding.weight = doubts.weight(finding.photo, int(label), other)
    return found


def _groups(groups: np.ndarray) -> list[list[int]]:
    """Return the photos of each picture that is there more than once."""
    first = np.flatnonzero(np.bincount(groups) > 1)
    return [np.flatnonzero(groups == group).tolist() for group in first]


class Findings:
    """The photos to look at, each once, with all reasons why."""

    def __init__(self, photos: Photos, classes: Sequence[str], doubts: Doubts) -> None:
        self.photos, self.classes, self.doubts = photos, classes, doubts
        self._found: dict[int, Finding] = {}

    def add(self, photo: int, kind: str, suggestion: str, reason: str) -> Finding:
        """Note a reason; the one of the most serious kind decides what is suggested."""
        if photo not in self._found:
            own = float(self.doubts.probabilities[photo, self.photos.labels[photo]])
            likely = self._likely(photo)
            self._found[photo] = Finding(photo, kind, suggestion, own, likely)
        finding = self._found[photo]
        if KINDS.index(kind) < KINDS.index(finding.kind):
            finding.kind, finding.suggestion = kind, suggestion
        finding.reasons.append(reason)
        return finding

    def add_copies(self, same: list[int]) -> None:
        """Note what is wrong with copies of one picture: other labels, or that they are there.

        One copy may stay, the one in the test, so that the test does not change.
        """
        kept = min(same, key=lambda photo: (-SPLITS.index(self.photos.splits[photo]), photo))
        names = {photo: self.classes[self.photos.labels[photo]] for photo in same}
        for photo in same:
            twins = [twin for twin in same if twin != photo]
            if others := sorted(set(names.values()) - {names[photo]}):
                reason = f"the same picture is also called {join_names(others)}"
                finding = self.add(photo, CONFLICT, others[0], reason)
            elif photo != kept:
                where = join_names(sorted({self.photos.splits[twin] for twin in twins}))
                finding = self.add(photo, TWICE, DROP, f"the same picture is also in {where}")
            else:
                continue
            finding.twins = twins

    def in_order(self) -> list[Finding]:
        """Sort by kind, then by the probability of the label."""

        def key(finding: Finding) -> tuple[int, float, int]:
            return KINDS.index(finding.kind), finding.label_probability, finding.photo

        return sorted(self._found.values(), key=key)

    def _likely(self, photo: int) -> dict[str, float]:
        probabilities = self.doubts.probabilities[photo]
        best = np.argsort(-probabilities, kind="stable")[: SUGGESTIONS + 1].tolist()
        own = int(self.photos.labels[photo])
        likely = [c for c in best if c != own and probabilities[c] >= LIKELY][:SUGGESTIONS]
        return {self.classes[c]: float(probabilities[c]) for c in likely}


def _summary(findings: Sequence[Finding], photos: Photos, classes: Sequence[str]) -> list[str]:
    kinds = Counter(finding.kind for finding in findings)
    lines = [
        f"{len(photos.paths):,} photos: {kinds[LABEL]:,} labels to doubt, {kinds[CONFLICT]:,} "
        f"photos with a copy of another label, {kinds[TWICE]:,} copies, {kinds[NO_FOOD]:,} like no "
        "dish of the data"
    ]
    counts = np.bincount(photos.labels, minlength=len(classes))
    small = [f"{name} ({n})" for name, n in zip(classes, counts, strict=True) if n < MIN_PHOTOS]
    if small:
        lines.append(f"labels of these classes are not judged, too few photos: {join_names(small)}")
    return lines


# What is written ------------------------------------------------------------------------------


def _rows(
    findings: Sequence[Finding], photos: Photos, classes: Sequence[str]
) -> list[dict[str, str]]:
    return [
        {
            "path": photos.names[finding.photo],
            "label": classes[photos.labels[finding.photo]],
            "suggestion": finding.suggestion,
            "label_probability": f"{finding.label_probability:.6f}",
            "split": photos.splits[finding.photo],
            "kind": finding.kind,
            "why": "; ".join(finding.reasons),
        }
        for finding in findings
    ]


def _cards(
    findings: Sequence[Finding],
    photos: Photos,
    classes: Sequence[str],
    model: nn.Module,
    config: TrainingConfig,
) -> list[dict[str, Any]]:
    network = SpatialNetwork(model, config.model_name)
    has_places = network.fits(config.preprocessing.crop)
    cards = []
    for finding in findings:
        look = None
        if has_places and finding.weight is not None:
            look = functools.partial(_evidence_of, network, finding, config.preprocessing)
        card = {
            **_shown(finding.photo, photos, classes, look),
            "kind": finding.kind,
            "suggestion": finding.suggestion,
            "likely": finding.likely,
            "reasons": finding.reasons,
            "twins": [_shown(twin, photos, classes) for twin in finding.twins[:SUGGESTIONS]],
        }
        cards.append(card)
    return cards


def _evidence_of(
    network: SpatialNetwork, finding: Finding, recipe: PreprocessConfig, image: Image.Image
) -> ActivationMap:
    """Say what in a picture looks like the suggestion rather than like the label."""
    assert finding.weight is not None
    pixels = EvalTransform(recipe)(image)
    spatial = network.features(normalize(pixels.unsqueeze(0), recipe))
    grid = as_grid(place_evidence(spatial, finding.weight))
    return ActivationMap(finding.suggestion, grid, seen_side(recipe))


def _shown(
    photo: int, photos: Photos, classes: Sequence[str], look: Look | None = None
) -> dict[str, Any]:
    return {
        "name": photos.names[photo],
        "split": photos.splits[photo],
        "label": classes[photos.labels[photo]],
        **picture_of(photos.paths[photo], whole, look),
    }
