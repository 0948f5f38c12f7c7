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
    place_evidence,
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
    alone = np.arange(len(features))
    assert same_pictures(features, hashes).tolist() == alone.tolist()
    features[7] = directions(features[[3]] ** 2 + 0.001)[0]
    features[150] = features[20]
    expected = alone.copy()
    expected[7], expected[150] = 3, 20
    assert same_pictures(features, hashes).tolist() == expected.tolist()


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_pictures_are_grouped_whatever_the_block(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are linked through others are one group, named by its first photo."""
    rng = np.random.default_rng(1)
    features = directions(rng.gamma(1.0, 1.0, (60, 64)))
    hashes = rng.random((60, 64)) < 0.5
    chain = features[50] + np.linspace(0, 1, 5)[:, None] * (features[3] - features[50])
    for photo, between in zip((50, 12, 31, 59, 3), directions(chain), strict=True):
        features[photo] = between
    features[[20, 21, 22]] = features[20]
    monkeypatch.setattr("training.release.label_audit.BLOCK", block)
    groups = same_pictures(features, hashes)
    ends = features[[3, 50]] - features.mean(axis=0)
    assert ends[0] @ ends[1] < 0.6 * np.prod(np.linalg.norm(ends, axis=1))  # not by themselves
    assert {3, 12, 31, 50, 59} == set(np.flatnonzero(groups == 3).tolist())
    assert np.flatnonzero(groups == 20).tolist() == [20, 21, 22]
    assert len(set(groups.tolist())) == 60 - 4 - 2


def test_the_places_share_what_speaks_for_a_class() -> None:
    """Their mean is all of it; a place where the features are zero has none."""
    generator = torch.Generator().manual_seed(0)
    spatial = torch.rand(32, 3, 4, generator=generator) - 0.2
    spatial[:, 1, 2] = 0
    weight = np.random.default_rng(0).normal(size=32).astype(np.float32)
    evidence = place_evidence(spatial, weight)
    whole = directions(spatial.mean(dim=(1, 2)).numpy()[None])[0] @ weight
    assert evidence.shape == (3, 4)
    assert evidence.mean().item() == pytest.approx(float(whole), abs=1e-5)
    assert evidence[1, 2] == 0


def test_a_doubt_is_explained_by_the_classifier_that_had_it() -> None:
    features, labels = clusters()
    noisy, alone = swap(labels, np.array([3])), np.arange(len(labels))
    doubts = doubt_labels(features, noisy, 4, alone, seed=0)
    weight = doubts.weight(3, 1, 0)
    assert weight is not None and features[3] @ weight > features[labels == 1].mean(0) @ weight
    assert doubts.weight(3, 0, 1) == pytest.approx(-weight)
    same_fold = np.flatnonzero(doubts.folds == doubts.folds[3])
    np.testing.assert_array_equal(doubts.weight(int(same_fold[0]), 1, 0), weight)
    few = np.flatnonzero((labels > 0) | (alone < 3))  # of class 0, only three
    small = doubt_labels(features[few], labels[few], 4, np.arange(len(few)), seed=0)
    assert small.weight(0, 0, 1) is None and small.weight(10, 1, 0) is None


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
