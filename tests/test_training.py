"""Training end to end, with the real command line on tiny data: it learns, and it can be stopped
anywhere and go on as if nothing had happened. `test_faults.py` has what may go wrong on the way."""

import dataclasses
import functools
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.runs import EXACT, Outcome, Trap, arguments, draw_photos, outcome, start
from tests.support.short_runs import (
    EPOCHS,
    SECONDS,
    after,
    free_port,
    needs_fork,
    release_quickly,
    send,
    train,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train_model
from app.ml.artifacts import read_record
from app.ml.model import BACKBONES, build_model
from training.compute import features, frozen_int8
from training.data import loader
from training.data.loader import Batch, Images, ReadingThreads, Sample, SampleKey
from training.run import checkpointer, checkpoints
from training.run.checkpoints import load_checkpoint
from training.run.state import Run

pytestmark = pytest.mark.usefixtures("short_runs")
GRADIENTS = train_model.gradients
# It learns ------------------------------------------------------------------------------------


def weights_of_known_scale(path: Path, model_name: str) -> Path:
    """Random weights whose batch-norm statistics are right, as those of trained ones are."""
    torch.manual_seed(0)
    model = build_model(model_name, 3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average of what it has seen
    with torch.no_grad():
        model(torch.randn(4, 3, 1, 1) * 1.5 + torch.randn(4, 3, 224, 224) / 2)
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.slow
def test_a_tiny_problem_is_really_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From pictures to a released model that knows the test pictures, and says so."""
    monkeypatch.undo()
    photos = draw_photos(tmp_path / "photos", noise=30)
    weights = str(weights_of_known_scale(tmp_path / "weights.pth", "mobilenet_v2"))
    more = ("--epochs", "8", "--batch_size", "4", "--freeze_layers", "14")
    model = ("--model_name", "mobilenet_v2", "--weights", weights)
    command = arguments(photos, tmp_path, *model, *more)
    assert train_model.main(command) == 0
    record = read_record(tmp_path / "models")
    assert record.metrics["test_top1"] >= 0.85
    assert max(epoch[EXACT.index("val_acc")] for epoch in outcome(tmp_path).history) >= 0.8
    assert record.classes == ["green", "red", "sky"]
    pictures = [str(photos / name / "00.jpg") for name in record.classes]
    place = ["--output_dir", str(tmp_path / "models")]
    assert train_model.main([*place, "--top_k", "2", "--predict", *pictures]) == 0
    lines = capsys.readouterr().out.splitlines()
    answers = [lines[lines.index(picture) + 1].split()[0] for picture in pictures]
    assert sum(map(str.__eq__, answers, record.classes)) >= 2
    assert len(lines) == 3 * (1 + 2 + 1)


def test_the_averaged_weights_are_validated_and_released(tmp_path: Path, photos: Path) -> None:
    assert train(tmp_path, photos, "--epochs", "1") == 0
    (path,) = tmp_path.glob("runs/*/checkpoint-000001.pt")
    state = torch.load(path, weights_only=True)
    weights = torch.load(tmp_path / "models" / "food_model_v1.pth", weights_only=True)
    assert torch.equal(weights["classifier.1.weight"], state["average"]["linear.weight"])
    assert not torch.equal(weights["classifier.1.weight"], state["model"]["classifier.1.weight"])


def test_training_and_testing_have_their_own_picture_sizes(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With views that are kept, too; a resumed run has those that it began with."""
    seen = set()
    real = features.FrozenPart.__call__

    def looking(part: features.FrozenPart, batch: Batch) -> torch.Tensor:
        seen.add((batch.color is not None, batch.images.shape[-1]))
        return real(part, batch)

    def row_of(**sizes: int) -> None:
        row = dataclasses.replace(BACKBONES["standin"], sizes=sizes)
        monkeypatch.setitem(BACKBONES, "standin", row)

    monkeypatch.setattr(features.FrozenPart, "__call__", looking)
    row_of(train_crop=40, test_resize=64, test_crop=56)
    for views in ("0", "1"):
        seen.clear()
        flags = ("--cache_views", views, "--epochs")
        assert train(tmp_path / views, photos, *flags, "1") == 0
        row_of(train_crop=32, test_resize=48, test_crop=48)
        assert train(tmp_path / views, photos, *flags, "2", "--resume", "auto") == 0
        row_of(train_crop=40, test_resize=64, test_crop=56)
        assert seen >= {(True, 40), (False, 56)} and {side for _, side in seen} == {40, 56}


@pytest.mark.parametrize("int8", [False, True])
def test_training_pictures_grow_and_a_resumed_run_sees_the_same(
    int8: bool, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    sizes = {"first_crop": 32, "train_crop": 96, "test_resize": 64, "test_crop": 64}
    row = dataclasses.replace(BACKBONES["standin"], sizes=sizes)
    monkeypatch.setitem(BACKBONES, "standin", row)
    monkeypatch.setattr(frozen_int8, "may_pay", lambda *_: int8)
    monkeypatch.setattr(frozen_int8, "compare", lambda *_: (2.0, 1.0))
    seen, real = [], train_model.gradients

    def looking(run: Run, module: Any, batch: Any, processes: Any) -> Any:
        seen.append((run.progress.epoch, batch.features.shape[-1]))
        return real(run, module, batch, processes)

    monkeypatch.setattr(train_model, "gradients", looking)
    epochs = ("--epochs", "5")
    assert train(tmp_path / "whole", photos, *epochs) == 0
    assert "pixels in epochs: 32 in 2, 64 in 2, 96 in 1" in caplog.text
    assert set(seen) == {(0, 8), (1, 8), (2, 16), (3, 16), (4, 24)}, "two layers are frozen"
    with monkeypatch.context() as patch:
        after(patch, train_model, "gradients", 12, send(signal.SIGTERM))
        assert train(tmp_path / "cut", photos, *epochs) == 143
    assert train(tmp_path / "cut", photos, *epochs, "--resume", "auto") == 0
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


# It goes on as if nothing had happened --------------------------------------------------------

VARIANTS = {
    "plain": (),
    "two workers": ("--num_workers", "2"),
    "cached views": ("--cache_views", "2"),
    "all frozen": ("--freeze_layers", "all"),
    "no average": ("--ema_decay", "0"),
    "a ViT of timm's": ("--model_name", "timm/test_vit", "--freeze_layers", "3"),
    "a ResNet of timm's": ("--model_name", "timm/test_resnet", "--freeze_layers", "2"),
    "no chain of layers": ("--model_name", "timm/eva02_tiny_patch14_224", "--freeze_layers", "9"),
}
SLOW = "no chain of layers"


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[pytest.mark.slow] if v == SLOW else []) for v in VARIANTS]
)
def test_a_run_that_is_stopped_twice_is_the_uninterrupted_run(
    variant: str,
    tmp_path: Path,
    photos: Path,
    undisturbed: Outcome,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the middle of epoch 2, and in the validation after it: 4 batches of 8 make an epoch."""
    more = VARIANTS[variant]
    if variant in ("plain", "two workers"):
        expected = undisturbed
    else:
        assert train(tmp_path / "whole", photos, *more) == 0
        expected = outcome(tmp_path / "whole")
        assert expected != undisturbed
    cut = (*more, "--resume", "auto")
    with monkeypatch.context() as patch:
        after(patch, train_model, "gradients", 6, send(signal.SIGTERM))
        assert train(tmp_path, photos, *cut) == 143
    assert "stopped by SIGTERM; resume with: python backend/train_model.py" in caplog.text
    with monkeypatch.context() as patch:
        after(patch, train_model, "predict_logits", 1, send(signal.SIGINT))
        assert train(tmp_path, photos, *cut) == 130
    assert "resumed after epoch 1, batch 2" in caplog.text
    assert train(tmp_path, photos, *cut) == 0
    assert "resumed after epoch 1, batch 4" in caplog.text
    assert outcome(tmp_path) == expected


def test_frozen_layers_in_integers_stay_those_of_the_run(
    tmp_path: Path, photos: Path, undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, too, which has nothing but a copy and finds integers slower."""
    monkeypatch.setattr(frozen_int8, "may_pay", lambda *_: True)
    monkeypatch.setattr(frozen_int8, "compare", lambda *_: (2.0, 1.0))
    assert train(tmp_path / "whole", photos) == 0
    expected = outcome(tmp_path / "whole")
    assert expected != undisturbed
    copied = ("--checkpoint_copy_dir", str(tmp_path / "copies"))
    with monkeypatch.context() as patch:
        after(patch, train_model, "gradients", 6, send(signal.SIGTERM))
        assert train(tmp_path, photos, *copied) == 143
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setattr(frozen_int8, "compare", lambda *_: (1.0, 2.0))
    assert train(tmp_path, photos, *copied, "--resume", "auto") == 0
    assert outcome(tmp_path) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("where", "owner", "name"),
    [
        ("first batch", train_model, "gradients"),
        ("first validation", features.FeatureStore, "put"),
        ("saving", checkpointer, "save_checkpoint"),
    ],
)
def test_a_signal_ends_a_run_with_a_checkpoint_and_the_command_to_go_on(
    where: str,
    owner: Any,
    name: str,
    number: signal.Signals,
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = signal.getsignal(number)
    after(monkeypatch, owner, name, 1, send(number))
    assert train(tmp_path, photos, "--resume=auto") == 128 + number
    assert signal.getsignal(number) is before
    (said,) = (m for m in caplog.messages if "stopped by" in m)
    assert number.name in said and said.endswith(
        "--num_workers 0 --no_mlflow --epochs 3 --resume auto"
    )
    newest = max(tmp_path.glob("runs/*/checkpoint-*.pt"))
    state = load_checkpoint(newest).state
    batches = {"first batch": (0, 1), "first validation": (0, 4), "saving": (1, 0)}
    assert (state["epoch"], state["batch"]) == batches[where]


def test_a_run_in_another_thread_is_the_same_run(
    tmp_path: Path, photos: Path, undisturbed: Outcome
) -> None:
    """Notebooks and web applications start it in one, where no signal can be handled."""
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        assert pool.submit(train, tmp_path, photos).result(SECONDS) == 0
    assert outcome(tmp_path) == undisturbed


def test_a_signal_while_the_model_is_tested_ends_the_run_at_once(
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Outcome,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(train_model, "release_model", send(signal.SIGTERM))
        assert train(tmp_path, photos) == 143
    assert train(tmp_path, photos, "--resume", "auto") == 0
    assert outcome(tmp_path) == undisturbed


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("signals", [(2, 2), (15, 15), (2, 15)])
def test_a_second_signal_stops_at_once(
    signals: tuple[int, ...], tmp_path: Path, photos: Path
) -> None:
    """While the checkpoint of the first is written, for example."""
    trap = Trap("train", 3, signals)
    process = start(arguments(photos, tmp_path), tmp_path / "log", trap, prepare=release_quickly)
    process.join(SECONDS)
    assert process.exitcode == -signals[1]


def own_group() -> None:
    """From here on, what this process sends to itself reaches its data workers too."""
    release_quickly()
    os.setpgid(0, 0)
    os.kill = lambda _, number: os.killpg(0, number)  # type: ignore[assignment]


@pytest.mark.slow
@needs_fork
def test_ctrl_c_reaches_the_data_workers_too_and_harms_nothing(
    tmp_path: Path, photos: Path, undisturbed: Outcome
) -> None:
    """As it does in a terminal."""
    argv = arguments(photos, tmp_path, *EPOCHS, "--resume", "auto", "--num_workers", "2")
    trap, log = Trap("train", 6, (signal.SIGINT,)), tmp_path / "log"
    process = start(argv, log, trap, prepare=own_group)
    process.join(SECONDS)
    assert process.exitcode == 130, log.read_text()
    assert "Traceback" not in log.read_text() and "resume with" in log.read_text()
    assert train(tmp_path, photos, "--resume", "auto") == 0
    assert outcome(tmp_path) == undisturbed


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize(
    ("kind", "number", "workers"),
    [
        ("train", 6, 2),  # the second batch of epoch 2
        ("validate", 3, 0),  # the validation after epoch 2
        ("checkpoint", 8, 0),  # half of the second one's bytes are written
        ("checkpoint", 12, 0),  # it is there, its manifest is not
    ],
)
def test_a_killed_run_is_the_uninterrupted_run(
    kind: str, number: int, workers: int, tmp_path: Path, photos: Path, undisturbed: Outcome
) -> None:
    """SIGKILL, in the middle of the things that take time."""
    argv = arguments(photos, tmp_path, *EPOCHS, "--resume", "auto", "--num_workers", str(workers))
    log = tmp_path / "log"
    process = start(argv, log, Trap(kind, number), save_seconds=0, prepare=release_quickly)
    process.join(SECONDS)
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    process = start(argv, log, prepare=release_quickly)
    process.join(SECONDS)
    assert process.exitcode == 0, log.read_text()
    assert "resumed after" in log.read_text()
    assert outcome(tmp_path) == undisturbed
    assert not list(tmp_path.glob("runs/*/.checkpoint-*.tmp"))


@pytest.mark.slow
def test_each_checkpoint_in_the_middle_of_an_epoch_leads_to_the_same_weights(
    tmp_path: Path, photos: Path, undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpointer, "CHECKPOINT_SECONDS", -1)
        patch.setattr(checkpointer, "READ_SECONDS", -1)
        patch.setattr(checkpoints, "KEEP", 99)
        assert train(tmp_path, photos) == 0
    assert outcome(tmp_path) == undisturbed
    paths = sorted(tmp_path.glob("runs/*/checkpoint-*.pt"))
    places = [(s["epoch"], s["batch"]) for s in (load_checkpoint(p).state for p in paths)]
    assert {(1, batch) for batch in (0, 1, 2, 3, 4)} <= set(places)
    for place in [(1, 3), (2, 4)]:
        path = paths[places.index(place)]
        folder = tmp_path / f"from {place}"
        (folder / "runs" / "run").mkdir(parents=True)
        for file in (path, path.with_suffix(".json")):
            shutil.copy(file, folder / "runs" / "run")
        assert train(folder, photos, "--resume", str(folder / "runs" / "run")) == 0
        assert outcome(folder) == undisturbed


# Which run is resumed -------------------------------------------------------------------------


def test_a_longer_run_goes_on_where_the_finished_one_stopped(
    tmp_path: Path, photos: Path, undisturbed: Outcome, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(tmp_path, photos, "--epochs", "2", "--resume", "auto") == 0
    assert "nothing to resume" in caplog.text
    assert train(tmp_path, photos, "--resume", "auto") == 0
    assert "resumed after epoch 2, batch 0" in caplog.text
    assert outcome(tmp_path) == undisturbed
    caplog.clear()
    assert train(tmp_path, photos, "--epochs", "1", "--resume", "auto") == 0
    assert "nothing to resume" in caplog.text
    assert len(list((tmp_path / "runs").glob("standin*"))) == 2


def test_resuming_needs_no_pretrained_file(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a fresh disk without internet: the checkpoint holds what came from it."""
    file = weights_of_known_scale(tmp_path / "weights.pth", "standin")
    weights = ("--weights", str(file), "--resume", "auto")
    assert train(tmp_path / "whole", photos, *weights) == 0
    with monkeypatch.context() as patch:
        after(patch, train_model, "gradients", 6, send(signal.SIGTERM))
        assert train(tmp_path / "cut", photos, *weights) == 143
    file.unlink()
    assert train(tmp_path / "cut", photos, *weights) == 0
    assert "weights of the checkpoint" in caplog.text
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_run_that_stopped_early_goes_on_with_more_patience(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To what it would have come to with that patience from the start."""
    monkeypatch.setattr(train_model, "validate_epoch", lambda run, *_: (run.progress.epoch, 0.5))
    assert train(tmp_path / "whole", photos) == 0
    more = ("--resume", "auto", "--early_stopping_patience")
    assert train(tmp_path / "cut", photos, *more, "1") == 0
    assert "early stop" in caplog.text and len(outcome(tmp_path / "cut").history) == 2
    assert train(tmp_path / "cut", photos, *more, "5") == 0
    assert "resumed after epoch 2" in caplog.text
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_another_configuration_and_damage_are_named_and_the_one_before_is_used(
    tmp_path: Path, photos: Path, undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    with monkeypatch.context() as patch:
        after(patch, train_model, "gradients", 6, send(signal.SIGTERM))
        assert train(tmp_path, photos) == 143
    first, newest = sorted(tmp_path.glob("runs/*/checkpoint-*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1000])
    path = str(newest)
    assert train(tmp_path, photos, "--resume", path) == 1
    assert f"{path} is damaged" in caplog.text
    assert train(tmp_path, photos, "--resume", str(first), "--learning_rate", "0.5") == 1
    assert "learning_rate is 0.5, was 0.001" in caplog.text
    assert train(tmp_path, photos, "--resume", str(tmp_path / "nowhere.pt")) == 1
    assert "nowhere.json is missing" in caplog.text
    assert train(tmp_path, photos, "--resume", "auto") == 0
    assert f"skipped: {path} is damaged" in caplog.text
    assert "resumed after epoch 1, batch 0" in caplog.text
    assert outcome(tmp_path) == undisturbed


# Many processes -------------------------------------------------------------------------------


def run_two(
    argv: list[str], folder: Path, trap: Trap | None = None, gradients: Path | None = None
) -> list[int]:
    """What torchrun --nproc_per_node=2 does; returns both exit codes. The trap is for rank 1."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = []
    for rank in ("0", "1"):
        environment = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        own = gradients.with_suffix(f".{rank}") if gradients else None
        prepare = functools.partial(join_as, environment, own)
        log = folder / f"log-{rank}"
        processes.append(start(argv, log, trap if rank == "1" else None, prepare=prepare))
    for process in processes:
        process.join(SECONDS)
    return [process.exitcode or 0 for process in processes]


def join_as(environment: dict[str, str], gradients: Path | None = None) -> None:
    """Become one of the processes; with a path, stop after the first step and leave its gradients,
    and what batch-norm has seen, there."""
    os.environ.update(environment)
    release_quickly()
    if gradients:
        train_model.gradients = functools.partial(first_step, gradients)  # type: ignore[assignment]


def first_step(path: Path, run: Run, *values: Any) -> Any:
    result = GRADIENTS(run, *values)
    found = {name: p.grad for name, p in run.trained.named_parameters()}
    torch.save({**found, **dict(run.trained.named_buffers())}, path)
    signal.raise_signal(signal.SIGTERM)
    return result


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize(("batch_size", "pretrained"), [("13", False), ("1", False), ("13", True)])
def test_two_processes_compute_the_gradients_of_one(
    batch_size: str, pretrained: bool, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an odd batch, of one of which only one process has an image, and where batch-norm keeps
    its statistics, as part of the convolutions."""
    file = weights_of_known_scale(tmp_path / "weights.pth", "standin")
    weights = str(file) if pretrained else "none"
    same = ("--batch_size", batch_size, "--precision", "fp32", "--weights", weights)
    monkeypatch.setattr(
        train_model, "gradients", functools.partial(first_step, tmp_path / "one.pt")
    )
    assert train(tmp_path, photos, *same) == 143
    argv = arguments(photos, tmp_path, *same)
    assert run_two(argv, tmp_path, gradients=tmp_path / "two") == [143, 143]
    one, two = (torch.load(tmp_path / name) for name in ("one.pt", "two.0"))
    assert one.keys() == two.keys()
    for name, expected in one.items():
        expected, got = expected.double(), two[name].double()
        # Rounding turns single ReLUs of this untrained network on or off, which moves its first
        # gradients by up to 1.4 %; test_distributed.py holds the layers themselves to 1e-4. A
        # value that is nothing but rounding (a bias before a batch-norm, its mean) is left aside.
        allowed = 1e-4 if pretrained else 0.03
        assert (got - expected).norm() <= allowed * expected.norm() + 1e-5, name


@pytest.mark.slow
@needs_fork
def test_two_processes_train_as_one_does(tmp_path: Path, photos: Path) -> None:
    """Stopped by a signal to one of them, and resumed; rank 0 alone speaks and writes."""
    same = ("--batch_size", "13", "--precision", "fp32", "--epochs", "2")
    assert train(tmp_path / "one", photos, *same) == 0
    two = tmp_path / "two"
    two.mkdir()
    argv = arguments(photos, two, *same, "--resume", "auto")
    assert run_two(argv, two, Trap("train", 5, (signal.SIGTERM,))) == [143, 143]
    assert run_two(argv, two) == [0, 0]
    assert "resumed after epoch 1, batch 2" in (two / "log-0").read_text()
    # Adam's first steps follow the sign of each gradient, and so make much of its rounding.
    ours, theirs = outcome(two).history, outcome(tmp_path / "one").history
    np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=2 / 27)
    assert (two / "log-1").read_text() == ""
    assert len(list((two / "runs").iterdir())) == 2  # the image cache and one run


# Signals and readers that hang ----------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize("name", ["SIGHUP", "SIGQUIT", "SIGUSR1", "SIGXCPU"])
def test_every_signal_that_ends_a_process_saves_first(
    name: str, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal that closes, Ctrl-backslash, a cluster that announces the end of a time slice."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # a test run in the background ignores some
    try:
        after(monkeypatch, train_model, "gradients", 2, send(number))
        assert train(tmp_path, photos, "--resume", "auto") == 128 + number
    finally:
        signal.signal(number, before)
    (newest,) = tmp_path.glob("runs/*/checkpoint-*.pt")
    assert load_checkpoint(newest).state["batch"] == 2


@needs_fork
def test_under_nohup_a_terminal_that_closes_stops_nothing(
    tmp_path: Path, photos: Path, undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        after(monkeypatch, train_model, "gradients", 2, send(signal.SIGHUP))
        assert train(tmp_path, photos) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert outcome(tmp_path) == undisturbed


class Hanging(Images):
    """Reads some batches and then hangs, as a reader that lost its batch does."""

    def __init__(self, paths: tuple[str, ...], *values: Any) -> None:
        super().__init__(paths, crop=values[1].sizes["train_crop"])

    def _read(self, key: SampleKey, path: str) -> Sample:  # noqa: ARG002
        if key.position == 0 and key.image % 2:
            time.sleep(SECONDS)
        return Sample(key, torch.zeros(3, self.crop, self.crop, dtype=torch.uint8))


@pytest.fixture
def threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What hangs in this test hangs in no other."""
    threads = ReadingThreads(2)
    monkeypatch.setattr(loader, "reading_threads", lambda: threads)
    monkeypatch.setattr(loader, "CLOSING_SECONDS", 0)
    yield
    threads.close()


@needs_fork
@pytest.mark.usefixtures("threads_of_its_own")
@pytest.mark.parametrize("num_workers", ["0", "1"])
def test_a_signal_is_obeyed_while_a_reader_hangs(
    num_workers: str, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.compute.features.TrainImages", Hanging)
    alarm = threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM))
    alarm.start()
    began = time.monotonic()
    try:
        assert train(tmp_path, photos, "--num_workers", num_workers) == 143
    finally:
        alarm.cancel()  # else it would stop a later test where this one fails
    assert time.monotonic() - began < 60
    assert list(tmp_path.glob("runs/*/checkpoint-*.pt"))


@needs_fork
def test_a_reader_that_hangs_ends_the_run_in_one_line(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("training.compute.features.TrainImages", Hanging)
    monkeypatch.setattr(loader, "READING_TIMEOUT", 1)
    assert train(tmp_path, photos, "--num_workers", "1") == 1
    assert "a process that reads images died or hangs" in caplog.messages[-1]
    assert "--shm-size" in caplog.messages[-1] and "\n" not in caplog.messages[-1]


@pytest.mark.usefixtures("threads_of_its_own")
def test_a_disk_that_hangs_ends_the_run_in_one_line(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("training.compute.features.TrainImages", Hanging)
    monkeypatch.setattr(loader, "READING_TIMEOUT", 1)
    assert train(tmp_path, photos) == 1
    assert "could not be read in 1 s; check the disk" in caplog.messages[-1]


# What a step must not do ----------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device, or processes for each other."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, values: Any = (), named: Any = None
    ) -> Any:
        name = str(function)
        self.count += "_local_scalar_dense" in name or name.startswith("c10d")
        return function(*values, **(named or {}))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_never_waits_for_the_device(
    precision: str, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 50 updates: nothing is read back, and nothing is exchanged but gradients."""
    step, updates = train_model.train_step, []

    def counted(*values: Any) -> torch.Tensor:
        with Reads() as reads:
            result = step(*values)
        updates.append(reads.count)
        return result

    monkeypatch.setattr(train_model, "train_step", counted)
    assert train(tmp_path, photos, "--epochs", "13", "--precision", precision) == 0
    assert len(updates) >= 50 and not any(updates)
