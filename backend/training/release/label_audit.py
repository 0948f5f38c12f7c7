"""Which photos' labels to doubt, from pooled features of a pretrained network alone.

Features are (N, num_features), labels (N,) of 0 to num_classes - 1. Nothing is trained but linear
classifiers in closed form, so 1,000 photos take a second, and the same seed gives the same answer.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.release.calibration import fit_temperature, softmax

NUM_FOLDS = 5
MIN_PHOTOS = 5  # of a class; with fewer, a fold learns the class from too few
SHRINKAGES = (0.5, 0.7, 0.9)  # of the covariance; the one whose held-out likelihood is highest
SAME_PICTURE = 0.8  # cosine of centered features; of 2,800 photos of 10 dishes, the pairs above
# were the same picture, and the pairs below 0.77 were not, with either of two backbones
SIMILAR_PICTURE = 0.6  # the same picture where the hash agrees too: small or badly compressed
HASH_BITS = 64
SAME_HASH = 6  # differing bits
FAR_OUT = 3.0  # interquartile ranges below the lower quartile (Tukey 1977)
BLOCK = 1024  # photos that are compared with as many others at once: 4 MB of cosines


class Doubts(NamedTuple):
    """What the audit thinks of each label.

    probabilities: (N, num_classes), out of fold; zeros for a photo of a class that is too small.
    is_error: (N,), whether confident learning counts the label as wrong. folds: (N,), -1 for those
    not judged. weights: (NUM_FOLDS, num_features, num_classes), of the classifier that judged the
    photos of a fold; zeros for a class that is too small.
    """

    probabilities: np.ndarray
    is_error: np.ndarray
    folds: np.ndarray
    weights: np.ndarray

    def weight(self, photo: int, label: int, other: int) -> np.ndarray | None:
        """Return what made a photo look like the other class rather than its label, or the
        contrary: (num_features,); None if one of them was not judged."""
        weights = self.weights[self.folds[photo]]
        if self.folds[photo] < 0 or not weights[:, other].any():
            return None
        difference: np.ndarray = weights[:, other] - weights[:, label]
        return difference


def directions(features: np.ndarray) -> np.ndarray:
    """Take signed square roots, then unit vectors (Perronnin et al. 2010): on such features linear
    classifiers do better, as no single feature decides."""
    rooted = np.sign(features) * np.sqrt(np.abs(features))
    return (rooted / np.maximum(np.linalg.norm(rooted, axis=1, keepdims=True), 1e-12)).astype(
        np.float32
    )


# Wrong labels ---------------------------------------------------------------------------------


def doubt_labels(
    features: np.ndarray, labels: np.ndarray, num_classes: int, groups: np.ndarray, seed: int
) -> Doubts:
    """Predict each photo by classifiers that never saw it, and find the labels to doubt.

    This is done twice: the second time, nothing is learned from the photos that the first time
    called wrong.

    features: as `directions` gives them. groups: (N,), the same number for the same picture: no
    copy of a photo may vouch for its label.
    """
    counts = np.bincount(labels, minlength=num_classes)
    judged = np.flatnonzero(counts[labels] >= MIN_PHOTOS)
    kept, small = np.unique(labels[judged], return_inverse=True)
    doubts = Doubts(
        probabilities=np.zeros((len(labels), num_classes)),
        is_error=np.zeros(len(labels), dtype=bool),
        folds=np.full(len(labels), -1),
        weights=np.zeros((NUM_FOLDS, features.shape[1], num_classes), dtype=np.float32),
    )
    if len(kept) < 2:
        return doubts
    x, folds = features[judged], assign_folds(small, groups[judged], seed)
    found, _ = held_out_probabilities(x, small, folds, np.ones(len(x), dtype=bool))
    found, weights = held_out_probabilities(x, small, folds, ~confident_errors(found, small))
    doubts.probabilities[np.ix_(judged, kept)] = found
    doubts.is_error[judged] = confident_errors(found, small)
    doubts.folds[judged] = folds
    doubts.weights[:, :, kept] = weights
    return doubts


def assign_folds(labels: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Deal the photos of each class out to folds; those of a group all go where its first goes.

    Not so where a group is more than half of a class: then too few others would be left to learn
    the class from.
    """
    folds = np.empty(len(labels), dtype=np.int64)
    rng = np.random.default_rng(seed)
    for label in np.unique(labels):
        photos = rng.permutation(np.flatnonzero(labels == label))
        folds[photos] = np.arange(len(photos)) % NUM_FOLDS
    _, first, place = np.unique(groups, return_index=True, return_inverse=True)
    sizes, counts = np.bincount(place)[place], np.bincount(labels)[labels]
    return np.where(2 * sizes > counts, folds, folds[first][place])


def held_out_probabilities(
    features: np.ndarray, labels: np.ndarray, folds: np.ndarray, is_learned: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Predict each fold from the others: (N, num_classes); also return with which weights,
    (NUM_FOLDS, num_features, num_classes).

    Linear discriminant analysis with a shrunk covariance (Friedman 1989). The shrinkage and the
    temperature are those under which the held-out labels are most likely.

    is_learned: (N,), whether a photo may be learned from.
    """
    is_learned = is_learned | ~_has_enough(labels, folds, is_learned)
    num_classes = labels.max() + 1
    logits = np.empty((len(SHRINKAGES), len(labels), num_classes))
    weights = np.zeros((len(SHRINKAGES), NUM_FOLDS, features.shape[1], num_classes), np.float32)
    for fold in np.unique(folds):
        held_out = folds == fold
        learned = ~held_out & is_learned
        found = discriminants(features[learned], labels[learned], num_classes)
        for number, (weight, bias) in enumerate(found):
            logits[number, held_out] = features[held_out] @ weight + bias
            weights[number, fold] = weight
    probabilities = [softmax(each, fit_temperature(each, labels)) for each in logits]
    actual = [each[np.arange(len(labels)), labels] for each in probabilities]
    losses = [-np.log(np.maximum(each, 1e-12)).mean() for each in actual]
    best = int(np.argmin(losses))
    return probabilities[best], weights[best]


def _has_enough(labels: np.ndarray, folds: np.ndarray, is_learned: np.ndarray) -> np.ndarray:
    """Whether each photo's class keeps a photo to learn from, whichever fold is held out."""
    enough = np.ones(labels.max() + 1, dtype=bool)
    for fold in np.unique(folds):
        rest = labels[is_learned & (folds != fold)]
        enough &= np.bincount(rest, minlength=len(enough)) > 0
    return enough[labels]


def discriminants(
    features: np.ndarray, labels: np.ndarray, num_classes: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Give, for each shrinkage, weight (num_features, num_classes) and bias of
    log p(class | features), up to a constant."""
    counts = np.bincount(labels, minlength=num_classes)
    one_hot = np.eye(num_classes, dtype=np.float32)[labels]
    means = one_hot.T @ features / np.maximum(counts, 1)[:, None]
    residuals = features - means[labels]
    covariance = residuals.T @ residuals / len(labels)
    width = len(covariance)
    prior = np.log(np.maximum(counts, 1e-9) / len(labels))
    for shrinkage in SHRINKAGES:
        ridge = max(shrinkage * np.trace(covariance) / width, 1e-9)
        shrunk = (1 - shrinkage) * covariance + ridge * np.eye(width)
        weight = np.linalg.solve(shrunk, means.T)
        yield weight, prior - 0.5 * (means.T * weight).sum(axis=0)


def confident_joint(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count photos by given and by likely true class, and return that class of each, or -1.

    Confident learning (Northcutt, Jiang and Chuang 2021, JAIR 70, equations 1 and 2; as in
    cleanlab): a photo belongs to class j if p_j is at least its mean over the photos labeled j; of
    several such classes, to the most probable one.
    """
    num_classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=num_classes)
    thresholds = np.bincount(labels, weights=own, minlength=num_classes) / np.maximum(counts, 1)
    confident = np.where(probabilities >= thresholds, probabilities, -1.0)
    true = np.where(confident.max(axis=1) >= 0, confident.argmax(axis=1), -1)
    joint = np.zeros((num_classes, num_classes))
    np.add.at(joint, (labels[true >= 0], true[true >= 0]), 1)
    return joint, true


def confident_errors(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Find the photos whose label is likely wrong: (N,).

    As many of each given class as the joint, calibrated to the given counts (equation 3), has off
    its diagonal: those with the lowest probability of their label (the paper's "prune by class").
    """
    joint, _ = confident_joint(probabilities, labels)
    own = probabilities[np.arange(len(labels)), labels]
    is_error = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        photos = np.flatnonzero(labels == label)
        row = joint[label]
        share = 1 - row[label] / row.sum() if row.any() else 0.0
        doubted = photos[probabilities[photos].argmax(axis=1) != label]
        order = doubted[np.argsort(own[doubted], kind="stable")]
        is_error[order[: round(share * len(photos))]] = True
    return is_error


# The same picture -----------------------------------------------------------------------------


def difference_hash(images: Tensor) -> np.ndarray:
    """Hash pictures, uint8 (N, 3, H, W), to bool (N, 64): whether each of 8 by 9 cells is brighter
    than its left neighbor (dHash, Krawetz 2013)."""
    gray = images.float().mean(dim=1, keepdim=True)
    cells = torch.nn.functional.adaptive_avg_pool2d(gray, (8, 9))
    return (cells[..., 1:] > cells[..., :-1]).flatten(1).numpy()


def same_pictures(features: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Find the photos that show the same picture, however cropped or compressed: (N,), the first
    of each photo's group.

    All pairs are compared, block by block. A group is all that is linked by pairs.

    features: as `directions` gives them.
    """
    centered = features - features.mean(axis=0)
    centered /= np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-12)
    groups = np.arange(len(centered))
    for start in range(0, len(centered), BLOCK):
        for other in range(start, len(centered), BLOCK):
            cosines = centered[start : start + BLOCK] @ centered[other : other + BLOCK].T
            rows, columns = np.nonzero(cosines >= SIMILAR_PICTURE)
            bits = (hashes[start + rows] != hashes[other + columns]).sum(axis=1)
            is_same = (cosines[rows, columns] >= SAME_PICTURE) | (bits <= SAME_HASH)
            is_pair = is_same & (start + rows < other + columns)
            groups = joined(groups, start + rows[is_pair], other + columns[is_pair])
    return groups


def joined(groups: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Join the groups of the photos of some pairs; a group is named by its first photo."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    if not len(rows):
        return groups
    ends = np.concatenate([groups, groups[rows]]), np.concatenate([np.arange(len(groups)), columns])
    graph = coo_matrix((np.ones(len(ends[0]), dtype=bool), ends), shape=(len(groups),) * 2)
    _, component = connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)
    return first[component]


# Where the network looked --------------------------------------------------------------------


def place_evidence(spatial: Tensor, weight: np.ndarray) -> Tensor:
    """Say what each place of a photo adds to `features @ weight`, which is their mean: (h, w).

    As a class activation map does for the features themselves: the part of each goes to the places
    in proportion to its size there.

    spatial: (num_features, h, w), of which the features are the mean. weight: (num_features,), for
    features as `directions` gives them.
    """
    pooled = spatial.mean(dim=(1, 2)).numpy()
    parts = torch.from_numpy(directions(pooled[None])[0] * weight)
    sizes = spatial.abs()
    shares = sizes / sizes.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    return torch.einsum("c,chw->hw", parts, shares)


# No food --------------------------------------------------------------------------------------


def far_out(features: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Find the photos that resemble no class: (N,).

    As in serving, what counts is the cosine to the nearest class's mean direction; far out is what
    lies `FAR_OUT` interquartile ranges below the lower quartile.
    """
    sums = np.zeros((num_classes, features.shape[1]), dtype=np.float32)
    np.add.at(sums, labels, features)
    centers = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    similarities = (features @ centers.T).max(axis=1)
    low, high = np.quantile(similarities, [0.25, 0.75])
    return similarities < low - FAR_OUT * (high - low)
