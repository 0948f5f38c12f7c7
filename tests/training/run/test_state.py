"""The rules of a run: when the rate falls, when it stops, which epoch is the best; the average of
the weights; and what a checkpoint must bring back."""

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny_runs import Tiny, make_run, same, tiny_data, train_steps
from torch import nn

import train_model
from app.ml.model import TrainedPart
from training.compute.distributed import Processes
from training.compute.features import FeatureBatch
from training.compute.memory import MicroBatch
from training.config import TrainingConfig
from training.data.manifest import fingerprint
from training.data.splits import FoodData, Split
from training.errors import TrainingError
from training.run.checkpoints import save_checkpoint
from training.run.resume import find_checkpoint
from training.run.state import (
    EarlyStopping,
    Progress,
    WeightAverage,
    plain_copy,
)

# The plateau rule -----------------------------------------------------------------------------

# Some differ by a millionth, which counts as lower too.
LOSS = st.tuples(st.integers(0, 6), st.integers(0, 3)).map(lambda n: n[0] / 4 + n[1] / 1e6)
LOSSES = st.lists(LOSS | st.floats(0, 9), max_size=40)


@settings(max_examples=150, deadline=None)
@given(
    losses=LOSSES,
    patience=st.integers(0, 4),
    factor=st.sampled_from([0.1, 0.5, 0.9]),
    rate=st.sampled_from([1e-1, 1e-3]),
)
def test_property_9_the_rate_falls_exactly_when_it_should(
    losses: list[float], patience: int, factor: float, rate: float
) -> None:
    """After more than `patience` epochs without a lower loss; any lower loss counts."""
    run = make_run(
        scheduler_patience=patience,
        scheduler_factor=factor,
        learning_rate=rate,
        backbone_lr_scale=0.5,
    )
    rates = [rate, rate * 0.5]  # of the head, of the layers before it
    lowest, bad = math.inf, 0
    for loss in losses:
        run.lr_scheduler.step(loss)
        if loss < lowest:
            lowest, bad = loss, 0
        else:
            bad += 1
        if bad > patience:
            bad = 0
            # torch leaves a rate alone that would hardly change
            rates = [r * factor if r - r * factor > 1e-8 else r for r in rates]
        assert [group["lr"] for group in run.optimizer.param_groups] == rates


# Early stopping ----------------------------------------------------------------------------------

EPOCHS = st.lists(
    st.tuples(st.integers(0, 4).map(lambda n: n / 2), st.integers(0, 3).map(lambda n: n / 3)),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(epochs=EPOCHS, patience=st.integers(1, 6))
def test_property_10_stopping_and_the_best_epoch_are_exactly_as_said(
    epochs: list[tuple[float, float]], patience: int
) -> None:
    stopping = EarlyStopping(patience)
    assert not stopping.should_stop
    for number in range(1, len(epochs) + 1):
        loss, accuracy = epochs[number - 1]
        is_best = stopping.judge(number, loss, accuracy)
        seen = epochs[:number]
        highest = max(a for _, a in seen)
        lowest_of_best = min(loss for loss, a in seen if a == highest)
        best = 1 + seen.index((lowest_of_best, highest))
        assert stopping.best_epoch == best
        assert is_best == (best == number)
        assert (stopping.best_acc, stopping.best_loss) == (highest, lowest_of_best)
        lowest_at = 1 + [loss for loss, _ in seen].index(min(loss for loss, _ in seen))
        assert stopping.should_stop == (number - lowest_at >= patience)


@settings(max_examples=200, deadline=None)
@given(epochs=EPOCHS, num_images=st.integers(1, 2000))
def test_accuracies_within_one_standard_error_are_a_tie(
    epochs: list[tuple[float, float]], num_images: int
) -> None:
    """An epoch takes over with a lower loss, or where the best one is no longer near the top."""
    stopping, best = EarlyStopping(9, num_images), 0
    for number, (loss, accuracy) in enumerate(epochs, start=1):
        is_best = stopping.judge(number, loss, accuracy)
        highest = max(a for _, a in epochs[:number])
        enough = highest - math.sqrt(highest * (1 - highest) / num_images)
        was_loss, was_accuracy = epochs[best - 1] if best else (math.inf, -1.0)
        takes_over = accuracy >= enough and (loss < was_loss or was_accuracy < enough)
        assert is_best == takes_over
        best = number if takes_over else best
        assert (stopping.best_epoch, epochs[best - 1]) == (
            best,
            (stopping.best_loss, stopping.best_acc),
        )
        assert stopping.best_acc >= enough


def test_on_200_images_a_point_is_chance_and_on_many_it_is_not() -> None:
    for num_images, best in [(0, 2), (200, 3), (20_000, 2)]:
        stopping = EarlyStopping(9, num_images)
        for epoch, loss, accuracy in [(1, 0.9, 0.75), (2, 0.7, 0.80), (3, 0.6, 0.79)]:
            stopping.judge(epoch, loss, accuracy)
        assert stopping.best_epoch == best


def test_a_run_of_an_earlier_version_keeps_its_exact_ties() -> None:
    run = make_run()
    run.early_stopping.judge(1, 0.5, 0.9)
    then = run.state()
    for name in ("num_images", "highest_acc"):
        del then["early_stopping"][name]
    later = make_run()
    later.restore(then)
    assert not later.early_stopping.judge(2, 0.4, 0.89)
    assert later.early_stopping.judge(3, 0.6, 0.91)


def test_random_layers_learn_at_the_rate_of_the_head() -> None:
    """A smaller rate protects what pretraining gave; without it there is nothing to protect."""
    for weights, share in (("imagenet", 0.2), ("none", 1.0)):
        run = make_run(weights=weights, learning_rate=0.1, backbone_lr_scale=0.2)
        assert [group["lr"] for group in run.optimizer.param_groups] == [0.1, 0.1 * share]
        sizes = [len(group["params"]) for group in run.optimizer.param_groups]
        assert sizes == [2, len(list(run.trained.parameters())) - 2]


def test_a_run_is_done_after_its_epochs_or_when_it_stops_early() -> None:
    run = make_run(epochs=3, early_stopping_patience=1)
    assert not run.is_done
    run.progress.epoch = 3
    assert run.is_done
    run.progress.epoch = 2
    run.early_stopping.judge(1, 1.0, 0.5)
    assert not run.is_done
    run.early_stopping.judge(2, 1.0, 0.6)
    assert run.is_done


# The average ----------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(decay=st.floats(0.01, 0.999), steps=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_average_follows_its_formula_statistics_included(
    decay: float, steps: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Tiny()
    trained = TrainedPart([model.block, nn.AdaptiveAvgPool2d(1)], model.head)
    average = WeightAverage(trained, decay)
    expected = {k: v.double().clone() for k, v in trained.state_dict().items()}
    for n in range(1, steps + 1):
        with torch.no_grad():
            for value in trained.state_dict().values():
                if value.is_floating_point():
                    value.add_(torch.randn_like(value))
        average.update()
        kept = min(decay, (1 + n) / (10 + n))
        for key, value in trained.state_dict().items():
            expected[key] = kept * expected[key] + (1 - kept) * value.double()
    assert any(key.endswith("running_var") for key in expected)
    for key, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[key], atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in average.module.parameters())


def test_without_decay_the_average_is_the_trained_part_itself() -> None:
    run = make_run(ema_decay=0.0)
    assert run.average.module is run.trained
    train_steps(run, 2)
    assert run.average.module is run.trained and run.average.updates == 2
    assert run.state()["average"] == {}


# An update ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_batch_without_a_readable_image_changes_nothing(precision: str) -> None:
    """The last batch of an epoch may be one image; fp16's scaler refuses to step without it."""
    run = make_run(precision=precision)
    none = torch.zeros(0, dtype=torch.int64)
    batch = FeatureBatch(torch.zeros(0, 2, 5, 5), none, none, num_images=1)
    before = copy.deepcopy(run.state())
    result = train_model.train_step(run, run.trained, batch, Processes())
    assert result.tolist() == [0, 0, 0, 1]
    assert same(run.state(), before)


# Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [[8], [4, 4], [3, 3, 2], [1] * 8])
def test_a_micro_batch_covers_each_image_once(parts: list[int]) -> None:
    slices = MicroBatch(parts[0]).parts(8)
    assert [list(range(8))[part] for part in slices] == [
        list(range(sum(parts[:i]), sum(parts[: i + 1]))) for i in range(len(parts))
    ]
    assert MicroBatch(3).parts(0) == [slice(0, 3)]


def test_the_micro_batch_halves_when_memory_runs_out_and_for_no_other_reason() -> None:
    gpu = torch.OutOfMemoryError("CUDA out of memory")
    cpu = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    micro_batch = MicroBatch(5)
    for error, size in [(gpu, 3), (cpu, 2), (MemoryError(), 1)]:
        failing = iter([error])

        def compute(failing: Iterator[Exception] = failing) -> int:
            for error in failing:
                raise error
            return micro_batch.size

        assert micro_batch.attempt(compute) == size
    with pytest.raises(TrainingError, match="not enough memory for a single image"):
        micro_batch.halve(cpu)
    with pytest.raises(RuntimeError, match="another"):
        MicroBatch(8).halve(RuntimeError("another"))


# Progress and the whole state -----------------------------------------------------------------


def step(loss: float, correct: int, count: int) -> torch.Tensor:
    return torch.tensor([loss, correct, count, math.isfinite(loss)])


def alone(*values: float) -> list[float]:
    return list(values)


def test_progress_sums_when_it_is_read_and_starts_anew() -> None:
    progress = Progress()
    progress.add(step(3.0, 2, 4), seconds=0.5)
    progress.add(step(1.0, 1, 2), seconds=1.5)
    assert (progress.batch, progress.count) == (2, 0)
    assert progress.read(alone) == 0
    assert (progress.loss_sum, progress.correct, progress.count) == (4.0, 3, 6)
    assert progress.seconds == 2.0 and progress.read(alone) == 0
    progress.finish_epoch({"val_loss": 1.0})
    assert progress == Progress(epoch=1, history=[{"val_loss": 1.0}])


def test_the_first_batch_that_is_not_finite_is_named() -> None:
    progress = Progress()
    for loss in (1.0, 2.0):
        progress.add(step(loss, 1, 2), 1.0)
    assert progress.read(alone) == 0
    for loss in (3.0, math.nan, math.inf, 4.0):
        progress.add(step(loss, 1, 2), 1.0)
    assert progress.read(alone) == 4


def test_nothing_is_saved_that_was_not_read() -> None:
    progress = Progress()
    progress.add(step(1.0, 1, 2), 1.0)
    with pytest.raises(AssertionError):
        progress.state()


def test_the_state_is_a_copy_that_training_does_not_change() -> None:
    run = make_run()
    train_steps(run, 1)
    state = run.state()
    weights = {k: v.clone() for k, v in state["model"].items()}
    averages = {k: v.clone() for k, v in state["average"].items()}
    train_steps(run, 2, seed=1)
    assert same(state["model"], weights) and same(state["average"], averages)
    assert not same(run.state()["model"], weights)


def test_a_run_begun_before_a_setting_was_added_has_its_default(tmp_path: Path) -> None:
    state = make_run().state()
    del state["config"]["label_smoothing"]
    path = save_checkpoint(tmp_path / "run", state)
    for smoothing, found in ((0.1, path), (0.2, None)):
        config = TrainingConfig(
            freeze_layers=0, label_smoothing=smoothing, checkpoint_dir=tmp_path, resume="auto"
        )
        checkpoint, _ = find_checkpoint(config, tiny_data())
        assert (checkpoint and checkpoint.path) == found


def test_a_plain_copy_is_contiguous_and_on_the_cpu() -> None:
    images = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    copied = plain_copy(OrderedDict(a=images))["a"]
    assert copied.is_contiguous() and not copied.requires_grad
    assert torch.equal(copied, images)


def test_a_resumed_run_may_have_another_patience() -> None:
    run = make_run(early_stopping_patience=5)
    run.early_stopping.judge(1, 1.0, 0.5)
    run.early_stopping.judge(2, 2.0, 0.5)
    later = make_run(early_stopping_patience=1)
    later.restore(run.state())
    assert later.early_stopping == EarlyStopping(1, 3, 1, 0.5, 1.0, 0.5, 1.0, 1)
    assert later.is_done


def changed(**parts: Any) -> FoodData:
    values = {**vars(tiny_data()), **parts}
    return FoodData(**values)


def test_the_fingerprint_changes_with_the_images_and_not_with_their_folder() -> None:
    split = tiny_data().train
    assert fingerprint(tiny_data()) == fingerprint(
        changed(train=Split(tuple(f"/elsewhere/{path}" for path in split.paths), split.labels))
    )
    others = [
        changed(class_to_idx={"a": 1, "b": 0}),
        changed(train=Split(split.paths[:2], split.labels[:2])),
        changed(train=Split(("a/9.jpg", *split.paths[1:]), split.labels)),
        changed(val=Split(split.paths, np.array([0, 1, 1]))),
        changed(test=Split(split.paths[::-1], split.labels)),
    ]
    prints = {fingerprint(data) for data in [tiny_data(), *others]}
    assert len(prints) == 6


@pytest.mark.parametrize(("weights", "changes"), [("imagenet", False), ("none", True)])
def test_batch_norm_keeps_the_statistics_that_pretraining_gave(weights: str, changes: bool) -> None:
    run = make_run(weights=weights)
    before = copy.deepcopy(dict(run.trained.named_buffers()))
    run.train_mode()
    run.trained(torch.rand(4, 2, 5, 5))
    assert same(before, dict(run.trained.named_buffers())) is not changes
