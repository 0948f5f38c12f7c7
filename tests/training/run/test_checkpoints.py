"""Checkpoints: what is restored is what was saved, and no damage is ever loaded or deleted."""

import contextlib
import copy
import dataclasses
import errno
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny_runs import make_run, same, tiny_data, train_steps

import train_model
from app.ml.model import BACKBONES
from training.config import TrainingConfig
from training.data.manifest import write_manifest
from training.data.splits import FoodData, Split
from training.errors import CheckpointError
from training.run import checkpoints
from training.run import resume as resuming_module
from training.run.checkpoints import (
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    run_folders,
    save_checkpoint,
)
from training.run.resume import find_checkpoint as find
from training.run.resume import locked, mark_finished, recipe_then, sizes_then
from training.run.state import EarlyStopping, Progress


@pytest.fixture(scope="module", autouse=True)
def quick_disk() -> Iterator[None]:
    """Thousands of files are written here; waiting for the disk each time would take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def state(epoch: int = 1, batch: int = 0, **more: Any) -> dict[str, Any]:
    return {"epoch": epoch, "batch": batch, "weights": torch.full((4,), float(epoch)), **more}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def anything(_folder: Path, _state: dict[str, Any]) -> None:
    return None


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    steps=st.integers(0, 3),
    seed=st.integers(0, 10**6),
    decay=st.sampled_from([0.0, 0.5, "on"]),
    losses=st.lists(st.floats(0, 9), max_size=9),
    progress=st.builds(
        Progress,
        epoch=st.integers(0, 99),
        batch=st.integers(0, 999),
        loss_sum=st.floats(0, 1e6),
        correct=st.integers(0, 10**6),
        count=st.integers(0, 10**6),
        seconds=st.floats(0, 1e6),
        history=st.lists(st.dictionaries(st.text(max_size=3), st.floats(0, 1)), max_size=3),
    ),
)
def test_property_4_a_checkpoint_restores_the_run_exactly(
    steps: int, seed: int, decay: float | str, losses: list[float], progress: Progress
) -> None:
    """And the restored run goes on as the first one does."""
    run = make_run(ema_decay=decay, seed=seed, scheduler_patience=0)
    train_steps(run, steps, seed)
    for epoch, loss in enumerate(losses, start=1):
        run.lr_scheduler.step(loss)
        if run.early_stopping.judge(epoch, loss, (loss * 7) % 1):
            run.best_weights = copy.deepcopy(run.average.module.state_dict())
    run.progress, run.micro_batch.size = progress, 3
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(Path(folder), run.state())
        resumed = make_run(ema_decay=decay, seed=seed + 1, scheduler_patience=0)
        train_steps(resumed, 1, seed + 1)
        assert not same(resumed.state()["model"], run.state()["model"])
        resumed.restore(load_checkpoint(path).state)
    expected = run.state()
    expected["config"] = resumed.state()["config"]  # the seed differs, so that nothing is equal
    assert same(resumed.state(), expected)
    train_steps(run, 2, seed)
    train_steps(resumed, 2, seed)
    assert same(resumed.state()["model"], run.state()["model"])
    assert same(resumed.state()["average"], run.state()["average"])
    assert same(resumed.state()["optimizer"], run.state()["optimizer"])


def test_the_best_weights_of_an_earlier_epoch_are_brought_back(tmp_path: Path) -> None:
    run = make_run()
    run.early_stopping = EarlyStopping(5, best_epoch=1)
    run.best_weights = {k: v.clone() for k, v in run.average.module.state_dict().items()}
    train_steps(run, 3)
    resumed = make_run(seed=1)
    resumed.restore(load_checkpoint(save_checkpoint(tmp_path, run.state())).state)
    assert same(resumed.best_weights, run.best_weights)
    assert not same(resumed.best_weights, dict(resumed.average.module.state_dict()))


def test_a_checkpoint_holds_nothing_but_plain_values(tmp_path: Path) -> None:
    """So that loading one can never run code."""
    run = make_run()
    train_steps(run, 1)
    path = save_checkpoint(tmp_path, run.state())
    assert torch.load(path, weights_only=True)["name"] == run.name
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert manifest["bytes"] == path.stat().st_size


def test_two_at_most_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    for epoch in range(1, 6):
        path = save_checkpoint(tmp_path, state(epoch))
        kept = {f"checkpoint-{n:06d}.{kind}" for n in (epoch - 1, epoch) for kind in ("pt", "json")}
        assert set(files(tmp_path)) == {name for name in kept if "000000" not in name}
    found = newest_checkpoint([tmp_path], anything)
    assert found is not None and found.path == path and found.state["epoch"] == 5


def harm(path: Path, how: str) -> None:
    content, manifest = path.read_bytes(), path.with_suffix(".json")
    what, _, ninth = how.partition(" at ")
    place = int(ninth or 0) * (len(content) - 1) // 9
    if what == "truncated":
        path.write_bytes(content[:place])
    elif what == "byte flipped":
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif how == "file missing":
        path.unlink()
    elif how == "manifest missing":
        manifest.unlink()
    elif how == "manifest empty":
        manifest.write_bytes(b"")
    elif how == "manifest no object":
        manifest.write_text("[]")
    elif how == "manifest binary":
        manifest.write_bytes(b"\xff\x00")


# From the first byte (0: nothing is left of the truncated file) to the last.
HARMS = [
    *(f"{what} at {ninth}" for what in ("truncated", "byte flipped") for ninth in range(10)),
    "manifest missing",
    "manifest empty",
    "manifest no object",
    "manifest binary",
]


@pytest.mark.parametrize("how", HARMS)
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, last = (save_checkpoint(tmp_path, state(epoch)) for epoch in (1, 2))
    harm(last, how)
    before = files(tmp_path)
    found = newest_checkpoint([tmp_path], anything)
    assert found is not None and found.path == first and found.state["epoch"] == 1
    assert files(tmp_path) == before  # nothing is deleted
    (message,) = caplog.messages
    assert message.startswith("skipped") and last.stem in message
    with pytest.raises(CheckpointError, match=last.stem):
        load_checkpoint(last)


def test_a_missing_one_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state())
    harm(path, "file missing")
    with pytest.raises(CheckpointError, match=r"checkpoint-000001.pt is missing"):
        load_checkpoint(path)
    assert newest_checkpoint([tmp_path, tmp_path / "none"], anything) is None


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 10**6), bits=st.integers(1, 255))
def test_no_changed_byte_is_ever_loaded(place: int, bits: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(Path(folder), state())
        content = bytearray(path.read_bytes())
        content[place % len(content)] ^= bits
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(path)


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """Root may read and write everything, so that it becomes somebody else for a while."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that others may enter too, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


no_windows = pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")


@no_windows
@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_one_that_may_not_be_read_is_named_and_passed_over(
    suffix: str, reachable: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, last = (save_checkpoint(reachable, state(epoch)) for epoch in (1, 2))
    last.with_suffix(suffix).chmod(0)
    before = {path.name for path in reachable.iterdir()}
    with without_rights():
        found = newest_checkpoint([reachable], anything)
    assert found is not None and found.path == first
    assert "cannot be read" in caplog.text and last.name in caplog.text
    assert {path.name for path in reachable.iterdir()} == before


@no_windows
def test_a_folder_that_may_not_be_written_keeps_what_it_has(reachable: Path) -> None:
    save_checkpoint(reachable, state(1))
    before = files(reachable)
    reachable.chmod(0o555)
    with without_rights(), pytest.raises(PermissionError):
        save_checkpoint(reachable, state(2))
    assert files(reachable) == before


def test_what_was_just_written_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of large networks, each is half a GB, on the thread that trains."""
    read: list[Path] = []
    read_bytes = Path.read_bytes

    def reading(path: Path) -> bytes:
        read.append(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", reading)
    paths = [save_checkpoint(tmp_path, state(epoch)) for epoch in (1, 2, 3, 4)]
    assert read == [paths[1], paths[2]]


def test_another_format_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "FORMAT_VERSION", 2)
    path = save_checkpoint(tmp_path, state())
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"format 2, this one reads 3\); finish the run with"):
        load_checkpoint(path)


@settings(max_examples=100, deadline=None)
@given(at=st.integers(1, 6), kept=st.integers(0, 3), name=st.sampled_from(["fsync", "replace"]))
def test_a_save_that_fails_leaves_the_old_ones(at: int, kept: int, name: str) -> None:
    calls = 0
    real = getattr(os, name)

    def full(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        folder = Path(temporary)
        for epoch in range(1, kept + 1):
            save_checkpoint(folder, state(epoch))
        before = files(folder)
        patch.setattr(os, name, full)
        try:
            save_checkpoint(folder, state(9))
            expected = 9
        except OSError:
            expected = kept
            assert before.items() <= files(folder).items()
            assert {path.name for path in folder.glob("*.pt")} <= before.keys()  # no half one
        patch.undo()
        assert (calls == at) == (expected == kept)
        found = newest_checkpoint([folder], anything)
        assert (found.state["epoch"] if found else 0) == expected


# Which one is resumed -------------------------------------------------------------------------


def saved(checkpoint_dir: Path, age: int, **changes: Any) -> Path:
    """A run with one checkpoint, written `age` seconds ago."""
    run = make_run(**changes)
    train_steps(run, 1)
    path = save_checkpoint(checkpoint_dir / run.name, run.state())
    write_manifest(path.parent, tiny_data())
    written = path.stat().st_mtime_ns - age * 10**9
    os.utime(path, ns=(written, written))
    return path


def find_checkpoint(config: TrainingConfig, data: FoodData) -> Checkpoint | None:
    return find(config, data)[0]


def resuming(
    checkpoint_dir: Path, resume: str = "auto", **changes: Any
) -> tuple[TrainingConfig, FoodData]:
    places: dict[str, Any] = {"checkpoint_dir": checkpoint_dir, "resume": resume}
    return TrainingConfig(**{"freeze_layers": 0, **places, **changes}), tiny_data()


def test_auto_takes_the_newest_of_the_same_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, age=30)
    right = saved(tmp_path, age=20)
    other = saved(tmp_path, age=10, learning_rate=0.5)
    found = find_checkpoint(*resuming(tmp_path, epochs=99, num_workers=3))
    assert found is not None and found.path == right
    assert str(other) in caplog.text
    assert "learning_rate is 0.001, was 0.5" in caplog.text
    assert run_folders(tmp_path)[0] == other.parent
    assert other.exists()


def test_a_home_that_nobody_has_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--resume ~nobodyhere/c\.pt: "):
        find_checkpoint(*resuming(tmp_path, resume="~nobodyhere/c.pt"))


def test_auto_names_what_is_damaged_and_takes_another_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right, damaged = saved(tmp_path, age=20), saved(tmp_path, age=10)
    harm(damaged, "truncated at 5")
    found = find_checkpoint(*resuming(tmp_path))
    assert found is not None and found.path == right
    assert f"{damaged} is damaged" in caplog.text


def test_auto_with_nothing_there_says_that_a_new_run_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert find_checkpoint(*resuming(tmp_path / "none")) is None
    assert "nothing to resume" in caplog.text
    assert find_checkpoint(TrainingConfig(checkpoint_dir=tmp_path), tiny_data()) is None


def test_auto_passes_over_a_finished_run_unless_more_epochs_are_asked_for(tmp_path: Path) -> None:
    run = make_run(epochs=2)
    run.progress.epoch = 2
    path = save_checkpoint(tmp_path / run.name, run.state())
    mark_finished(path.parent, run, version=1)
    assert find_checkpoint(*resuming(tmp_path, epochs=2)) is None
    found = find_checkpoint(*resuming(tmp_path, epochs=3))
    assert found is not None and found.path == path


def test_auto_takes_up_a_run_that_stopped_early_if_there_is_more_patience(tmp_path: Path) -> None:
    run = make_run(epochs=9, early_stopping_patience=2)
    for epoch in (1, 2, 3):
        run.early_stopping.judge(epoch, float(epoch), 0.5)
    run.progress.epoch = 3
    path = save_checkpoint(tmp_path / run.name, run.state())
    mark_finished(path.parent, run, version=1)
    for patience, epochs, goes_on in [(2, 9, False), (2, 99, False), (3, 9, True), (3, 3, False)]:
        more = resuming(tmp_path, epochs=epochs, early_stopping_patience=patience)
        assert (find_checkpoint(*more) is not None) == goes_on


def test_the_precision_is_compared_by_what_it_meant(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun with auto where that is bf16: bf16 in words is the same, another auto is said."""

    def auto_is(meant: str) -> None:
        monkeypatch.setattr(
            train_model, "choose_precision", lambda word, _: meant if word == "auto" else word
        )

    auto_is("bf16")
    path = saved(tmp_path, age=1)
    auto_is("fp32")
    found = find_checkpoint(*resuming(tmp_path, str(path), precision="bf16"))
    assert found is not None
    with pytest.raises(CheckpointError, match="precision is 'fp32', was 'auto'"):
        find_checkpoint(*resuming(tmp_path, str(path), precision="fp32"))
    assert find_checkpoint(*resuming(tmp_path, str(path))) is not None
    for word, said in [("bf16", 0), ("auto", 1)]:
        make_run(precision=word).restore(found.state)
        messages = [m for m in caplog.messages if "pass --precision bf16 to match" in m]
        assert len(messages) == said


def test_a_resumed_run_keeps_the_sizes_of_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the backbone's own are by then; other ones that are asked for make another run."""
    begun = {"first_crop": 96, "train_crop": 192, "test_resize": 272, "test_crop": 256}
    path = saved(tmp_path, age=1, **begun)
    row = dataclasses.replace(BACKBONES["mobilenet_v2"], sizes={"train_crop": 160})
    monkeypatch.setitem(BACKBONES, "mobilenet_v2", row)
    for asked in ({}, begun, {"test_crop": 256}):
        found = find_checkpoint(*resuming(tmp_path, str(path), **asked))
        assert found is not None and sizes_then(found.state) == begun
    with pytest.raises(CheckpointError, match="test_crop is 224, was 256"):
        find_checkpoint(*resuming(tmp_path, str(path), test_crop=224))


def test_a_run_from_before_there_were_sizes_has_those_of_imagenet_from_first_to_last(
    tmp_path: Path,
) -> None:
    run = make_run()
    names = ("first_crop", "train_crop", "test_resize", "test_crop", "small_epochs")
    then = run.state()
    then = {**then, "config": {k: v for k, v in then["config"].items() if k not in names}}
    del then["sizes"], then["small_epochs"]
    path = save_checkpoint(tmp_path / run.name, then)
    found = find_checkpoint(*resuming(tmp_path, str(path)))
    assert found is not None
    assert recipe_then(found.state) == dict(zip(names, (224, 224, 232, 224, 0), strict=True))


def test_pictures_go_on_growing_as_they_began_to_in_a_run_that_becomes_longer(
    tmp_path: Path,
) -> None:
    """Resumed twice: the settings of a run that was resumed once are numbers, no longer `auto`."""
    path = saved(tmp_path, age=2, epochs=10)
    for age in (1, 0):
        found = find_checkpoint(*resuming(tmp_path, str(path), epochs=20))
        assert found is not None
        then = recipe_then(found.state)
        assert (then["first_crop"], then["small_epochs"]) == (160, 8)
        path = saved(tmp_path, age, epochs=20, **then)
    with pytest.raises(CheckpointError, match="small_epochs is 3, was 8"):
        find_checkpoint(*resuming(tmp_path, str(path), small_epochs=3))


def test_pretrained_weights_are_compared_by_content_and_need_not_be_there(tmp_path: Path) -> None:
    file, copied = tmp_path / "weights.pth", tmp_path / "copied.pth"
    for path in (file, copied):
        path.write_bytes(b"some weights")
    path = saved(tmp_path / "runs", age=1, weights=str(file))

    def fits(weights: object) -> bool:
        config, data = resuming(tmp_path / "runs", weights=str(weights))
        return find_checkpoint(config, data) is not None

    assert fits(file) and fits(copied) and fits(tmp_path / "." / "runs" / ".." / file.name)
    copied.write_bytes(b"other weights")
    assert not fits(copied)
    file.unlink()
    assert fits(file) and fits("elsewhere/weights.pth") and not fits("imagenet")
    file.write_bytes(b"other weights")
    config, data = resuming(tmp_path / "runs", str(path), weights=str(file))
    with pytest.raises(CheckpointError, match=r"weights.pth with other content'"):
        find_checkpoint(config, data)
    assert load_checkpoint(path).state["weights_sha256"] != ""


def test_a_checkpoint_that_is_named_must_fit(tmp_path: Path) -> None:
    path = saved(tmp_path, age=1)
    for name in (path, path.parent):
        found = find_checkpoint(*resuming(tmp_path, str(name)))
        assert found is not None and found.path == path
    with pytest.raises(CheckpointError, match=r"another run: batch_size is 8, was 32"):
        find_checkpoint(*resuming(tmp_path, str(path), batch_size=8))
    with pytest.raises(CheckpointError, match="no checkpoint in this folder can be used"):
        find_checkpoint(*resuming(tmp_path, str(path.parent), batch_size=8))
    with pytest.raises(CheckpointError, match="missing"):
        find_checkpoint(*resuming(tmp_path, str(tmp_path / "checkpoint-000009.pt")))


def test_new_images_make_another_run(tmp_path: Path) -> None:
    path = saved(tmp_path, age=1)
    config, data = resuming(tmp_path, str(path))
    more = Split((*data.test.paths, "b/2.jpg"), np.array([0, 0, 1, 1]))
    with pytest.raises(CheckpointError, match=r"1 new images, e.g. b/2.jpg"):
        find_checkpoint(config, dataclasses.replace(data, test=more))
    with pytest.raises(CheckpointError, match=r"the classes differ \(c\)"):
        find_checkpoint(config, dataclasses.replace(data, class_to_idx={"a": 0, "b": 1, "c": 2}))


def test_a_run_keeps_its_list_when_images_are_gone_or_the_folder_has_moved(tmp_path: Path) -> None:
    """What is gone keeps its old path, so that whoever reads it names it and leaves it out."""
    path = saved(tmp_path, age=1)
    config, data = resuming(tmp_path, str(path))
    fewer = Split(("moved/b/1.jpg", "moved/a/1.jpg"), np.array([1, 0]))
    now = dataclasses.replace(data, train=fewer, val=fewer, test=fewer)
    found, then = find(config, now)
    assert found is not None
    assert then.train.paths == ("moved/a/1.jpg", "a/2.jpg", "moved/b/1.jpg")
    assert then.train.labels.tolist() == data.train.labels.tolist()
    assert find(config, data)[1] is data


def test_a_run_that_is_being_trained_is_not_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resuming_module, "ORPHAN_SECONDS", 0.1)
    path = saved(tmp_path, age=1)
    caplog.set_level(logging.INFO)
    with FileLock(path.parent / resuming_module.LOCK_NAME):
        assert find_checkpoint(*resuming(tmp_path)) is None
        assert "is in use; waiting up to 0.1 s for it" in caplog.text
        assert "another process is training this run" in caplog.text
        with pytest.raises(CheckpointError, match="another process is training this run"):
            find_checkpoint(*resuming(tmp_path, str(path)))
        with (
            pytest.raises(CheckpointError, match="another process is training this run"),
            locked(path.parent),
        ):
            pass
    assert find_checkpoint(*resuming(tmp_path)) is not None


def test_what_killed_writers_left_goes_with_the_next_checkpoints(tmp_path: Path) -> None:
    """And the last two that verify stay, whatever else is there."""
    good = save_checkpoint(tmp_path, state(1))
    for number in (2, 3):
        (tmp_path / f"checkpoint-{number:06d}.pt").write_bytes(b"half")
    (tmp_path / ".checkpoint-000004.pt.x.tmp").write_bytes(b"half")
    save_checkpoint(tmp_path, state(4))
    assert good.exists() and not list(tmp_path.glob("*.tmp"))
    save_checkpoint(tmp_path, state(5))
    names = {f"checkpoint-{n:06d}.{kind}" for n in (4, 5) for kind in ("pt", "json")}
    assert set(files(tmp_path)) == names
