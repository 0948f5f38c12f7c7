"""Photos whose labels to doubt: on a page where a person decides, and as a table.

The photos of all splits are looked at once, by the pretrained network as it is; which labels do not
fit follows from its pooled features, see `training.release.label_audit`.
"""

import contextlib
import csv
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from app.ml.model import build_model
from app.ml.predictor import TorchNetwork
from app.ml.preprocessing import ImageError, load_image, normalize
from training.compute.devices import choose_device, prepare_machine
from training.compute.distributed import losses_explained
from training.config import TrainingConfig
from training.data.folders import join_names
from training.data.labels import DROP, name_in_labels, read_labels
from training.data.loader import default_num_workers, eval_loader
from training.data.manifest import SPLITS
from training.data.splits import FoodData, folders_of
from training.errors import ConfigError, DataError
from training.release.label_audit import (
    MIN_PHOTOS,
    Doubts,
    difference_hash,
    directions,
    doubt_labels,
    far_out,
    groups_of,
    same_pictures,
)
from training.release.report import data_uri, write_page
from training.run.start import load_start

PAGE_NAME, TABLE_NAME = "audit.html", "audit.csv"
COLUMNS = ["path", "label", "suggestion", "label_probability", "split", "kind", "why"]
BATCH_SIZE = 64
SHOWN = 400  # photos on the page, about 15 kB each; the table has all of them
PREVIEW_SIZE = 300  # pixels
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
    with their probability. twins: photos of the same picture."""

    photo: int
    kind: str
    suggestion: str
    label_probability: float
    likely: dict[str, float]
    reasons: list[str] = field(default_factory=list)
    twins: list[int] = field(default_factory=list)


def audit_labels(config: TrainingConfig, data: FoodData) -> Path:
    """List the photos to look at on a page and in a table; return the page.

    Raises:
        ConfigError: the network cannot be built. WeightsError: its weights are not available.
        DataError: no photo can be read, or the page cannot be written.
    """
    photos = read_photos(config, data)
    reviewed = read_labels(config.labels) if config.labels else {}
    findings = [
        finding
        for finding in find(photos, data.classes, config.seed)
        if photos.names[finding.photo] not in reviewed
    ]
    for line in _summary(findings, photos, data.classes):
        logger.info("%s", line)
    page = config.output_dir / PAGE_NAME
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        _write_table(config.output_dir / TABLE_NAME, findings, photos, data.classes)
        _write_page(page, findings, photos, data, reviewed, config.model_name)
    except OSError as error:
        raise DataError(f"{page} cannot be written ({error.strerror}); see --output_dir") from error
    return page


# What the network sees ------------------------------------------------------------------------


def read_photos(config: TrainingConfig, data: FoodData) -> Photos:
    """Look at each photo of each split once."""
    device = choose_device(config.device, 0)
    prepare_machine()
    network = _network(config, data, device)
    splits = {name: getattr(data, name) for name in SPLITS}
    paths = [path for split in splits.values() for path in split.paths]
    labels = np.concatenate([split.labels for split in splits.values()])
    split_of = [name for name, split in splits.items() for _ in split.paths]
    indices, pooled, hashes = _looked_at(network, tuple(paths), config, device)
    folders, places = folders_of(config.source_dir, config.custom_data_dir), set(paths)
    return Photos(
        paths=[paths[i] for i in indices],
        names=[name_in_labels(paths[i], folders, places) for i in indices],
        labels=labels[indices],
        splits=[split_of[i] for i in indices],
        pooled=pooled,
        hashes=hashes,
    )


def _network(config: TrainingConfig, data: FoodData, device: torch.device) -> TorchNetwork:
    torch.manual_seed(config.seed)
    try:
        model = build_model(config.model_name, len(data.class_to_idx))
    except ValueError as error:  # a network of timm that cannot be cut
        raise ConfigError(f"--model_name {config.model_name}: {error}") from error
    logger.info("%s, %s", config.model_name, load_start(model, config, data.class_to_idx))
    if not config.is_pretrained:
        logger.warning("an untrained network tells dishes apart badly; leave --weights none out")
    return TorchNetwork(model, config.model_name, device)


def _looked_at(
    network: TorchNetwork, paths: tuple[str, ...], config: TrainingConfig, device: torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the indices of the readable photos, their features and their hashes."""
    workers = default_num_workers(device) if config.num_workers == "auto" else config.num_workers
    loader = eval_loader(paths, config.preprocessing, BATCH_SIZE, int(workers), device)
    indices, pooled, hashes = [], [], []
    bar = tqdm(total=len(paths), unit=" images", disable=None, leave=False)
    with contextlib.closing(loader), losses_explained(hint=""), logging_redirect_tqdm(), bar:
        for batch in loader:
            if len(batch.indices):
                indices.append(batch.indices.numpy())
                pooled.append(network(normalize(batch.images, config.preprocessing))[1].numpy())
                hashes.append(difference_hash(batch.images))
            bar.update(BATCH_SIZE)
    if not indices:
        raise DataError(f"none of {len(paths):,} photos can be read, e.g. {paths[0]}")
    return np.concatenate(indices), np.concatenate(pooled), np.concatenate(hashes)


# What to look at ------------------------------------------------------------------------------


def find(photos: Photos, classes: Sequence[str], seed: int) -> list[Finding]:
    """List the photos to look at, the most suspicious first."""
    features = directions(photos.pooled)
    groups = groups_of(same_pictures(features, photos.hashes), len(features))
    doubts = doubt_labels(features, photos.labels, len(classes), groups, seed)
    findings = Findings(photos, classes, doubts)
    for same in _groups(groups):
        findings.add_copies(same)
    for photo in np.flatnonzero(doubts.is_error).tolist():
        best = classes[int(doubts.probabilities[photo].argmax())]
        findings.add(photo, LABEL, best, f"looks like {best}")
    for photo in np.flatnonzero(far_out(features, photos.labels, len(classes))).tolist():
        findings.add(photo, NO_FOOD, DROP, "resembles no dish of the data")
    return findings.in_order()


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


def _write_table(
    path: Path, findings: Sequence[Finding], photos: Photos, classes: Sequence[str]
) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for f in findings:
            label, split = classes[photos.labels[f.photo]], photos.splits[f.photo]
            probability, why = f"{f.label_probability:.6f}", "; ".join(f.reasons)
            name = photos.names[f.photo]
            writer.writerow([name, label, f.suggestion, probability, split, f.kind, why])


def _write_page(
    path: Path,
    findings: Sequence[Finding],
    photos: Photos,
    data: FoodData,
    reviewed: Mapping[str, str],
    model_name: str,
) -> None:
    write_page(
        path,
        "audit.html",
        cards=[_card(finding, photos, data.classes) for finding in findings[:SHOWN]],
        num_found=len(findings),
        num_photos=len(photos.paths),
        source=data.audit["source"],
        model_name=model_name,
        classes=data.classes,
        before=reviewed,
        drop=DROP,
    )


def _card(finding: Finding, photos: Photos, classes: Sequence[str]) -> dict[str, Any]:
    return {
        **_shown(finding.photo, photos, classes),
        "kind": finding.kind,
        "suggestion": finding.suggestion,
        "likely": finding.likely,
        "reasons": finding.reasons,
        "twins": [_shown(twin, photos, classes) for twin in finding.twins[:SUGGESTIONS]],
    }


def _shown(photo: int, photos: Photos, classes: Sequence[str]) -> dict[str, Any]:
    return {
        "name": photos.names[photo],
        "split": photos.splits[photo],
        "label": classes[photos.labels[photo]],
        "picture": _preview(photos.paths[photo]),
    }


def _preview(file: str) -> str | None:
    """Encode the whole picture, small; None if it is gone."""
    try:
        image = load_image(file)
    except (ImageError, OSError):
        return None
    image.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
    return data_uri(image)
