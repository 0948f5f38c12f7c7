"""Doubts about labels of features whose truth is known; the formulas on worked examples."""

import numpy as np
import pytest
import torch

from training.release.label_audit import (
    MIN_PHOTOS,
    assign_folds,
    confident_joint,
    difference_hash,
    directions,
    doubt_labels,
    far_out,
    groups_of,
    same_pictures,
)


def clusters(num_classes: int = 4, per_class: int = 40, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), per_class)
    centers = rng.gamma(1.0, 1.0, (num_classes, 32))
    features = np.abs(centers[labels] + rng.normal(0, 0.5, (len(labels), 32)))
    return directions(features), labels


def swap(labels: np.ndarray, photos: np.ndarray) -> np.ndarray:
    changed = labels.copy()
    changed[photos] = (labels[photos] + 1) % (labels.max() + 1)
    return changed


def test_swapped_labels_are_found_and_named() -> None:
    features, labels = clusters()
    wrong = np.arange(0, len(labels), 16)
    noisy, alone = swap(labels, wrong), np.arange(len(labels))
    doubts = doubt_labels(features, noisy, 4, alone, seed=0)
    assert np.flatnonzero(doubts.is_error).tolist() == wrong.tolist()
    assert (doubts.probabilities[wrong].argmax(axis=1) == labels[wrong]).all()
    again = doubt_labels(features, noisy, 4, alone, seed=0)
    assert (again.probabilities == doubts.probabilities).all()
    np.testing.assert_allclose(doubts.probabilities.sum(axis=1), 1)


def test_a_copy_does_not_vouch_for_a_label() -> None:
    features, labels = clusters()
    features[:3], labels = features[0], swap(labels, np.arange(3))
    groups = np.arange(len(labels))
    groups[:3] = 0
    folds = assign_folds(labels, groups, seed=0)
    assert len(set(folds[:3].tolist())) == 1
    assert doubt_labels(features, labels, 4, groups, seed=0).is_error[:3].all()


@pytest.mark.parametrize("per_class", [[40, 40, 3], [40, 40, 1], [3, 3, 3]])
def test_classes_of_few_photos_are_not_judged(per_class: list[int]) -> None:
    features, labels = clusters(3)
    kept = np.concatenate([np.flatnonzero(labels == c)[:n] for c, n in enumerate(per_class)])
    doubts = doubt_labels(features[kept], labels[kept], 3, np.arange(len(kept)), seed=0)
    small = np.array(per_class)[labels[kept]] < MIN_PHOTOS
    assert not doubts.is_error[small].any()
    assert (doubts.probabilities[small] == 0).all()


def test_the_confident_joint_counts_as_in_the_paper() -> None:
    """Worked by hand: the thresholds are the mean own probabilities, 0.6 and 0.7."""
    first = np.array([0.8, 0.9, 0.1, 0.2, 0.35, 0.35])
    probabilities = np.stack([first, 1 - first], axis=1)
    labels = np.array([0, 0, 0, 1, 1, 1])
    joint, true = confident_joint(probabilities, labels)
    assert joint.tolist() == [[2, 1], [0, 1]]
    assert true.tolist() == [0, 0, 1, 1, -1, -1]


def test_the_same_picture_is_recognized_by_its_features_or_by_its_hash() -> None:
    rng = np.random.default_rng(1)
    features = directions(rng.gamma(1.0, 1.0, (160, 64)))
    hashes = rng.random((len(features), 64)) < 0.5
    assert same_pictures(features, hashes) == []
    features[7] = directions(features[[3]] ** 2 + 0.001)[0]
    features[150] = features[20]
    pairs = same_pictures(features, hashes)
    assert pairs == [(3, 7), (20, 150)]
    groups = groups_of([*pairs, (7, 20)], len(features))
    assert set(np.flatnonzero(groups == 3).tolist()) == {3, 7, 20, 150}


def test_the_hash_survives_another_size_and_brightness() -> None:
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(5, 3, 9, 10, generator=generator)
    images = torch.nn.functional.interpolate(small, (224, 224), mode="bilinear") * 200
    other = torch.nn.functional.interpolate(images, (96, 96), mode="area") * 0.8
    one, two = (difference_hash(i.to(torch.uint8)) for i in (images, other))
    assert (one != two).sum(axis=1).max() <= 4
    assert (one[0] != one[1]).sum() > 10


def test_what_resembles_no_class_is_far_out() -> None:
    features, labels = clusters()
    odd = directions(np.eye(32)[[0]])
    found = far_out(np.concatenate([features, odd]), np.append(labels, 0), 4)
    assert np.flatnonzero(found).tolist() == [len(labels)]
