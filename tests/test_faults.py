"""What may go wrong while a run trains: full disks, vanishing images, memory, numbers, killed
processes. The run says so, keeps what is good, goes on where it can, and no run is lost."""

import contextlib
import errno
import functools
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.runs import BACKEND, Outcome, arguments, draw_photos, outcome, start
from tests.support.short_runs import (
    COSTS,
    EPOCHS,
    SECONDS,
    after,
    free_port,
    long_only,
    needs_fork,
    one_thread,
    quick_release,
    send,
    train,
)

import train_model
from app.ml.artifacts import SaveError, list_versions, read_record
from app.ml.model import TrainedPart
from app.ml.predictor import load_model_for_inference
from training.compute import features
from training.compute.features import FrozenPart
from training.data.splits import load_food_data
from training.release import evaluation
from training.release.release import TrainingResult
from training.run import checkpointer, checkpoints
from training.run import record as tracking
from training.run import resume as resuming
from training.run.checkpoints import load_checkpoint
from training.run.state import MicroBatch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_runs")]
REAL_RELEASE = train_model.release_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A run of one epoch that was stopped before its release; copy it, do not change it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr(train_model, "release_model", send(signal.SIGTERM))
        assert train(folder, photos, "--epochs", "1") == 143
    return folder


def full(*_values: object, **_named: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_for(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, place: str, *numbers: int
) -> None:
    """No space for some of the calls whose first argument names this place."""
    real, calls = getattr(owner, name), 0

    def guarded(path: Any, *values: Any, **named: Any) -> Any:
        nonlocal calls
        if place in str(path):
            calls += 1
            if not numbers or calls in numbers:
                full()
        return real(path, *values, **named)

    monkeypatch.setattr(owner, name, guarded)


# A full disk, or one that may not be written --------------------------------------------------


def test_without_room_for_a_checkpoint_the_run_goes_on_and_the_last_good_one_stays(
    tmp_path: Path,
    photos: Path,
    undisturbed: Outcome,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each of an epoch's file and its manifest, the second and third time."""
    full_for(monkeypatch, checkpoints, "write_durably", "checkpoint-", 3, 5)
    assert train(tmp_path, photos) == 0
    assert caplog.text.count("no checkpoint could be written ([Errno 28]") == 2
    (good,) = tmp_path.glob("runs/*/checkpoint-*.pt")
    assert caplog.text.count(f"the last good one is {good}") == 2
    assert load_checkpoint(good).state["epoch"] == 1
    assert outcome(tmp_path) == undisturbed


def test_a_signal_is_obeyed_when_no_checkpoint_can_be_written(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full_for(monkeypatch, checkpoints, "write_durably", "checkpoint-")
    after(monkeypatch, train_model, "gradients", 1, send(signal.SIGTERM))
    assert train(tmp_path, photos) == 143
    assert "there is none" in caplog.text


def test_without_room_for_cache_features_and_record_the_run_is_the_same(
    tmp_path: Path,
    photos: Path,
    undisturbed: Outcome,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    full_for(monkeypatch, Path, "write_bytes", "image_cache")
    monkeypatch.setattr(features, "reserve", full)
    writes = []
    write = tracking.RunRecord._write

    def sometimes_full(record: tracking.RunRecord, path: Path, lines: bytes) -> None:
        writes.append(path)
        if 2 <= len(writes) <= 3:
            full()
        write(record, path, lines)

    monkeypatch.setattr(tracking.RunRecord, "_write", sometimes_full)
    assert train(tmp_path, photos) == 0
    for said in (
        "no more images are added to the cache",
        "features are recomputed every epoch",
        "no line",
    ):
        assert sum(said in message for message in caplog.messages) == 1
    assert outcome(tmp_path) == undisturbed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[float], Path]]:
    """Real file systems of so many MB, if this user may mount them."""
    mounted: list[Path] = []

    def mount(megabytes: float) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = [
            "mount",
            "-t",
            "tmpfs",
            "-o",
            f"size={megabytes * 1024:.0f}k",
            "tmpfs",
            str(folder),
        ]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a small file system cannot be mounted here ({error})")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full_stops_nothing(
    tmp_path: Path,
    photos: Path,
    undisturbed: Outcome,
    trained: Path,
    small_disk: Callable[[float], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One checkpoint fits, two do not."""
    (checkpoint,) = trained.glob("runs/*/checkpoint-*.pt")
    (tmp_path / "runs").symlink_to(small_disk(1.6 * checkpoint.stat().st_size / 2**20))
    assert train(tmp_path, photos) == 0
    assert caplog.text.count("no checkpoint could be written ([Errno 28]") == 2
    for said in ("no more images are added to the cache", "features are recomputed every epoch"):
        assert said in caplog.text
    (good,) = tmp_path.glob("runs/*/checkpoint-*.pt")
    assert load_checkpoint(good).state["epoch"] == 1
    assert not list(tmp_path.glob("runs/*/.checkpoint-*"))
    assert outcome(tmp_path) == undisturbed


def test_checkpoints_that_can_no_longer_be_written_cost_no_release(
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Their disk is gone since the first epoch, that of the models is not."""
    log_epoch = train_model.log_epoch

    def lose_checkpoints(*values: Any) -> None:
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        (tmp_path / "runs").touch()  # so that nothing can be made there again
        log_epoch(*values)

    monkeypatch.setattr(train_model, "log_epoch", lose_checkpoints)
    assert train(tmp_path, photos, "--epochs", "2") == 0
    assert (tmp_path / "models" / "food_model_v1.pth").exists()
    assert "no checkpoint could be written" in caplog.text
    assert "cannot be marked as finished" in caplog.text


@pytest.mark.parametrize(
    "megabytes", [pytest.param(0.1, id="nothing fits"), pytest.param(0.3, id="the weights fit")]
)
def test_a_model_that_cannot_be_saved_is_released_later_without_training_again(
    megabytes: float,
    tmp_path: Path,
    photos: Path,
    trained: Path,
    small_disk: Callable[[float], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(train_model, "release_model", REAL_RELEASE)
    shutil.copytree(trained / "runs", tmp_path / "runs")
    disk = small_disk(megabytes)
    (tmp_path / "models").symlink_to(disk)
    monkeypatch.setattr(train_model, "train_step", full)  # nothing trains from here on
    again = ("--epochs", "1", "--resume", "auto")
    assert train(tmp_path, photos, *again) == 1
    assert "could not be saved" in caplog.text and "No space left on device" in caplog.text
    assert "no retraining needed" in caplog.text
    assert {path.name for path in disk.iterdir()} == {".release.lock"}
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    assert train(tmp_path, photos, *again) == 0
    assert read_record(disk).version == 1
    assert train(tmp_path, photos, *again, "--dry_run") == 1  # train_step still says: full


@pytest.mark.parametrize(
    ("full_checkpoints", "more", "hinted"),
    [((), (), True), ((5, 6), (), False), ((), ("--dry_run",), False)],
)
def test_no_retraining_is_promised_only_where_this_run_is_saved_as_it_is(
    full_checkpoints: tuple[int, ...],
    more: tuple[str, ...],
    hinted: bool,
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither an older checkpoint of it nor one of another run is what was trained.

    Each checkpoint is two files: full is the disk for the one of the last epoch.
    """
    assert train(tmp_path, photos, "--epochs", "1", "--seed", "1") == 0
    monkeypatch.setattr(train_model, "release_model", unsaved)
    if full_checkpoints:
        full_for(monkeypatch, checkpoints, "write_durably", "checkpoint-", *full_checkpoints)
    assert train(tmp_path, photos, *more) == 1
    assert ("no retraining needed" in caplog.messages[-1]) == hinted
    assert caplog.messages[-1].startswith("the model could not be saved")


def unsaved(*_: object) -> None:
    raise SaveError("the model could not be saved")


@pytest.mark.parametrize("more", [(), ("--dry_run",)])
def test_a_command_to_resume_is_shown_only_where_there_is_something_to_resume(
    more: tuple[str, ...],
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if not more:
        full_for(monkeypatch, checkpoints, "write_durably", "checkpoint-")
    after(monkeypatch, train_model, "gradients", 1, send(signal.SIGTERM))
    assert train(tmp_path, photos, *more) == 143
    assert caplog.messages[-1] == "stopped by SIGTERM"


def test_a_folder_that_cannot_be_made_is_named(
    tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    place = str(tmp_path / "file" / "folder")
    assert train(tmp_path, photos, "--epochs", "1", "--checkpoint_dir", place) == 1
    assert place in caplog.messages[-1]


# Numbers --------------------------------------------------------------------------------------


def test_a_rate_that_is_far_too_high_is_named(
    tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(tmp_path, photos, "--learning_rate", "1e30") == 1
    said = caplog.messages[-1]
    assert "no longer finite at epoch 1, batch 2, learning rate 1e+30" in said
    assert "try a lower --learning_rate" in said and "none yet" in said


@pytest.mark.parametrize("what", ["loss", "gradient", "validation loss"])
def test_numbers_that_stop_being_finite_stop_the_run_and_spoil_no_checkpoint(
    what: str,
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real, calls = train_model.gradients, 0

    def spoilt(run: Any, *values: Any) -> Any:
        nonlocal calls
        calls += 1
        loss, correct = real(run, *values)
        if calls == 6 and what == "loss":
            return torch.tensor(math.nan), correct
        if calls == 6 and what == "gradient":
            run.trained.linear.weight.grad[0, 0] = math.inf
        return loss, correct

    monkeypatch.setattr(train_model, "gradients", spoilt)
    if what == "validation loss":
        monkeypatch.setattr(
            train_model,
            "predict_logits",
            lambda _run, _module, x: torch.full((len(x), 3), math.nan),
        )
    monkeypatch.setattr(checkpointer, "CHECKPOINT_SECONDS", -1)
    monkeypatch.setattr(checkpointer, "READ_SECONDS", -1)
    assert train(tmp_path, photos) == 1
    newest = max(tmp_path.glob("runs/*/checkpoint-*.pt"))
    place = "epoch 1, validation" if what == "validation loss" else "epoch 2, batch 2"
    assert place in caplog.messages[-1] and str(newest) in caplog.messages[-1]
    state = load_checkpoint(newest).state
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


# Memory ---------------------------------------------------------------------------------------

CPU_WORDS = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"


def limit_memory(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, most: int, error: Exception
) -> None:
    """Let a forward pass fail, after it is done, if there are more images in it."""
    real = getattr(owner, name)

    def limited(module: Any, *values: Any) -> torch.Tensor:
        result: torch.Tensor = real(module, *values)
        if len(result) > most:
            raise error
        return result

    monkeypatch.setattr(owner, name, limited)


def test_when_memory_runs_out_the_run_goes_on_in_smaller_parts_and_resumes_exactly(
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As if it had begun so: batch-norm does not count what an attempt that failed had seen."""
    with monkeypatch.context() as patch:
        patch.setattr(train_model, "MicroBatch", lambda _: MicroBatch(4))
        assert train(tmp_path / "begun so", photos) == 0
    limit_memory(monkeypatch, TrainedPart, "forward", 4, torch.OutOfMemoryError("out of memory"))
    with monkeypatch.context() as patch:
        after(patch, train_model, "gradients", 6, send(signal.SIGTERM))
        assert train(tmp_path / "cut", photos) == 143
    assert train(tmp_path / "cut", photos, "--resume", "auto") == 0
    said = [m for m in caplog.messages if "memory ran out" in m]
    assert len(said) == 1 and "now at most 4 images at a time" in said[0]
    assert outcome(tmp_path / "cut").history == outcome(tmp_path / "begun so").history
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "begun so")


def test_when_one_image_is_too_much_it_says_what_to_change(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limit_memory(monkeypatch, FrozenPart, "_features", 0, RuntimeError(CPU_WORDS))
    assert train(tmp_path, photos) == 1
    assert sum("memory ran out" in message for message in caplog.messages) == 3  # 4, 2, 1
    assert "--freeze_layers" in caplog.messages[-1] and "--model_name" in caplog.messages[-1]


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("out of memory"), RuntimeError(CPU_WORDS)]
)
def test_memory_that_is_short_elsewhere_is_one_line_too(
    error: Exception,
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where nothing can be split: the network itself, Adam's moments."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(train_model, "build_run", fail)
    assert train(tmp_path, photos) == 1
    assert caplog.messages[-1].startswith("memory ran out; close other programs")


# Images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["corrupt", "gone"])
def test_an_image_that_breaks_while_it_trains_is_left_out_and_named(
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And the run that was cut afterwards is the one that was not."""
    left_out = []

    def release(model: Any, data: Any, result: TrainingResult, device: Any) -> Any:
        left_out.append({Path(path).name for path in result.skipped})
        return quick_release(model, data, result, device)

    def spoil() -> None:
        path.write_bytes(b"no image") if fault == "corrupt" else path.unlink()

    monkeypatch.setattr(train_model, "release_model", release)
    for name, cuts in {"whole": (), "cut": (6, 2)}.items():
        photos = draw_photos(tmp_path / name / "photos")
        path = Path(load_food_data(photos).train.paths[20])
        with monkeypatch.context() as patch:
            after(patch, train_model, "gradients", 4, spoil)
            for cut in cuts:
                after(patch, train_model, "gradients", cut, send(signal.SIGTERM))
                assert train(tmp_path / name, photos, "--resume", "auto") == 143
            assert train(tmp_path / name, photos, "--resume", "auto") == 0
    assert left_out == [{path.name}, {path.name}]
    assert f"skipped {path}" in caplog.text
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("part", ["training", "validation"])
def test_when_all_images_are_gone_it_says_so(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    photos = draw_photos(tmp_path / "photos")
    data = load_food_data(photos)
    gone = data.train.paths if part == "training" else data.val.paths

    def remove(*_: object) -> None:
        for path in gone:
            os.remove(path)

    after(monkeypatch, train_model, "find_checkpoint", 1, remove)
    assert train(tmp_path, photos) == 1
    assert f"no {part} image could be read" in caplog.messages[-1]


def test_when_all_test_images_are_gone_nothing_is_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run keeps its own list: no image that it has trained on takes their place."""
    photos = draw_photos(tmp_path / "photos")
    one = ("--epochs", "1", "--resume", "auto")
    with monkeypatch.context() as patch:
        patch.setattr(train_model, "release_model", send(signal.SIGTERM))
        assert train(tmp_path, photos, *one) == 143
    for path in load_food_data(photos).test.paths:
        os.remove(path)
    monkeypatch.setattr(train_model, "release_model", REAL_RELEASE)
    assert train(tmp_path, photos, *one) == 1
    assert "none of 9 images can be read" in caplog.messages[-1]
    assert list_versions(tmp_path / "models") == []


# Processes ------------------------------------------------------------------------------------


def test_a_killed_image_reader_ends_the_run_with_a_reason(
    tmp_path: Path,
    photos: Path,
    undisturbed: Outcome,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        after(patch, train_model, "gradients", 6, kill_readers)
        assert train(tmp_path, photos, "--num_workers", "1") == 1
    assert "a process that reads images died" in caplog.messages[-1]
    assert train(tmp_path, photos, "--resume", "auto") == 0
    assert outcome(tmp_path) == undisturbed


def test_a_reader_killed_in_the_release_leaves_a_run_to_release(
    tmp_path: Path,
    photos: Path,
    undisturbed: Outcome,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(train_model, "release_model", REAL_RELEASE)
        patch.setattr(evaluation, "EVAL_BATCH_SIZE", 1)
        after(patch, evaluation, "normalize", 2, kill_readers)
        assert train(tmp_path, photos, "--num_workers", "1") == 1
    assert "a process that reads images died" in caplog.messages[-1]
    assert "--resume auto" in caplog.messages[-1]
    assert train(tmp_path, photos, "--resume", "auto") == 0
    assert outcome(tmp_path) == undisturbed


def kill_readers() -> None:
    for process in multiprocessing.active_children():
        process.kill()


def test_ctrl_c_before_the_training_is_no_traceback(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    after(monkeypatch, train_model, "load_food_data", 1, send(signal.SIGINT))
    assert train(tmp_path, photos) == 130
    assert "before there was anything to save" in caplog.messages[-1]


def die_before(name: str) -> None:
    """Kill this process when a file is about to be moved to its place under this name."""
    replace = os.replace

    def deadly(source: Any, target: Any) -> None:
        if Path(target).name == name and not Path(target).parent.name.startswith(".staging-"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = deadly  # type: ignore[assignment]


@needs_fork
@pytest.mark.parametrize(
    "name", ["food_model_v2.json", "class_to_idx.json", "model_config.json", "finished.json"]
)
def test_a_run_killed_while_its_model_is_published_is_released_once(
    name: str, tmp_path: Path, photos: Path, trained: Path, model_dir: Path
) -> None:
    """Beside an older model, which is served until the new one is whole."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    shutil.copytree(model_dir, tmp_path / "models")
    argv = arguments(photos, tmp_path, "--epochs", "1", "--resume", "auto")
    log = tmp_path / "log"
    process = start(argv, log, prepare=functools.partial(die_before, name))
    process.join(SECONDS)
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    current = 2 if name == "finished.json" else 1
    if name != "model_config.json":  # then the old record stands beside the new class map
        assert load_model_for_inference(tmp_path / "models").record.version == current
    process = start(argv, log)
    process.join(SECONDS)
    assert process.exitcode == 0, log.read_text()
    assert list_versions(tmp_path / "models") == [1, 2]
    assert load_model_for_inference(tmp_path / "models").record.version == 2
    leftovers = {p.name for p in (tmp_path / "models").iterdir() if p.name[0] == "."}
    assert leftovers == {".release.lock"}


def be_impatient() -> None:
    resuming.ORPHAN_SECONDS = 0.1  # type: ignore[assignment]


@needs_fork
def test_two_runs_at_once_get_along(tmp_path: Path, photos: Path) -> None:
    """One folder for both: two runs, two versions, one cache; neither takes up the other."""
    argv = arguments(photos, tmp_path, "--epochs", "1", "--resume", "auto")
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    processes = [start(argv, log, prepare=be_impatient) for log in logs]
    for process, log in zip(processes, logs, strict=True):
        process.join(SECONDS)
        assert process.exitcode == 0, log.read_text()
    assert list_versions(tmp_path / "models") == [1, 2]
    runs = [read_record(tmp_path / "models", version).training["run"] for version in (1, 2)]
    assert set(runs) == {path.name for path in (tmp_path / "runs").glob("standin*")}
    one, two = ((tmp_path / "models" / f"food_model_v{n}.pth").read_bytes() for n in (1, 2))
    assert one == two


# MLflow ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def mlflow_server(port: str, database: Path) -> Iterator["subprocess.Popen[bytes]"]:
    options = ["--port", port, "--backend-store-uri", f"sqlite:///{database}", "--workers", "1"]
    with (database.parent / "server.log").open("ab") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *options],
            cwd=database.parent,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        eventually(lambda: answers(port))
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(port: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def eventually(happened: Callable[[], bool]) -> None:
    for _ in range(10 * SECONDS):
        if happened():
            return
        time.sleep(0.1)
    raise AssertionError("it never happened")


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


@contextlib.contextmanager
def broken_mlflow(
    fault: str, port: str, database: Path
) -> Iterator[tuple[str, Callable[[], object] | None]]:
    """For as long as the context lasts: its tracking URI, and what breaks it if that is not yet."""
    server, store = f"http://127.0.0.1:{port}", f"sqlite:///{database}"
    if fault == "refused":
        yield server, None
    elif fault == "silent":
        with socket.create_server(("127.0.0.1", int(port))):
            yield server, None
    elif fault == "killed":
        with mlflow_server(port, database) as process:
            yield server, functools.partial(os.killpg, process.pid, signal.SIGKILL)
    elif fault == "locked":
        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            yield store, None
    elif fault == "removed":
        yield store, database.unlink
    elif fault == "disk full":
        fill(database.parent)
        yield store, None
        (database.parent / "filler").unlink()
    elif fault == "not installed":
        (database.parent / "mlflow.py").write_text("raise ImportError('No module named mlflow')")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(database.parent))
            yield store, None
    else:
        yield store, None


@long_only
# The mirror goes on by itself when the run is over, which a trainer that lives on would hear about.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    "fault",
    ["none", "refused", "silent", "killed", "locked", "removed", "disk full", "not installed"],
)
def test_mlflow_stops_no_run_and_is_in_sync_once_it_works(
    fault: str,
    tmp_path: Path,
    photos: Path,
    undisturbed: Outcome,
    small_disk: Callable[[float], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the real thing, servers included; test_mlflow_mirror.py has the same in small."""
    port, database = free_port(), small_disk(30) / "mlflow.db"
    with broken_mlflow(fault, port, database) as (uri, break_it):
        if break_it:
            later = functools.partial(when_mlflow_is_in_sync, tmp_path, break_it)
            after(monkeypatch, train_model, "gradients", 6, later)
        assert train(tmp_path, photos, tracking_uri=uri) == 0
    assert outcome(tmp_path) == undisturbed
    (finished,) = tmp_path.glob("runs/*/finished.json")
    server = mlflow_server(port, database) if uri[:4] == "http" else contextlib.nullcontext()
    command = [sys.executable, str(BACKEND / "train_model.py"), "--sync_mlflow"]
    with server:
        done = subprocess.run([*command, str(finished.parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with contextlib.closing(sqlite3.connect(database)) as connection:
        points = connection.execute("SELECT step FROM metrics WHERE key = 'val_loss'").fetchall()
        statuses = connection.execute("SELECT status FROM runs").fetchall()
    assert (sorted(points), statuses) == ([(1,), (2,), (3,)], [("FINISHED",)])


def when_mlflow_is_in_sync(folder: Path, act: Callable[[], object]) -> None:
    """Wait until MLflow has the first epoch, which is no time that a fault adds."""
    began = time.perf_counter()
    eventually(
        lambda: any("in sync" in log.read_text() for log in folder.glob("runs/*/mlflow.log"))
    )
    COSTS[folder].seconds -= time.perf_counter() - began
    act()


# Commands -------------------------------------------------------------------------------------


def test_a_dry_run_does_the_whole_job_and_leaves_nothing(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(train_model, "release_model", REAL_RELEASE)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(photos.rglob("*"))
    assert train(tmp_path / "run", photos, "--dry_run") == 0
    assert "nothing is kept" in caplog.messages[-1]
    assert not list(tmp_path.iterdir()) and sorted(photos.rglob("*")) == before


def test_predicting_without_a_model_says_how_to_train_one(
    tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture = str(photos / "red" / "00.jpg")
    assert train_model.main(["--output_dir", str(tmp_path), "--predict", picture]) == 1
    (said,) = caplog.messages
    assert "no trained model" in said and "train_model.py --sample" in said


@long_only
@pytest.mark.parametrize(
    "model_name", ["efficientnet_b0", "resnet50", "efficientnet_lite0", "efficientnet_lite2"]
)
def test_every_backbone_is_trained_and_released(
    model_name: str, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_model, "release_model", REAL_RELEASE)
    small = ("--model_name", model_name, "--images_per_class", "5", "--epochs", "1")
    assert train(tmp_path, photos, *small) == 0
    assert load_model_for_inference(tmp_path / "models").record.model_name == model_name


# torchrun -------------------------------------------------------------------------------------


@pytest.fixture
def torchrun(photos: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts two processes on a run in a folder; what still runs after the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start_two(folder: Path, *options: str) -> "subprocess.Popen[str]":
        argv = arguments(photos, folder, *EPOCHS, "--resume", "auto")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *options]
        folder.mkdir(exist_ok=True)
        with (folder / "log").open("w") as log:
            started.append(
                subprocess.Popen(
                    [*command, f"--master_port={free_port()}", f"{BACKEND}/train_model.py", *argv],
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=log,
                    stderr=log,
                    text=True,
                )
            )
        return started[-1]

    yield start_two
    for process in started:
        for child in [*trainers(process), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.wait()


def wait_for(happened: Callable[[], bool], process: "subprocess.Popen[str]", log: Path) -> None:
    for _ in range(10 * SECONDS):
        if happened():
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def trainers(process: "subprocess.Popen[str]") -> list[int]:
    if process.poll() is not None:
        return []
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


@long_only
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks processes up in /proc")
def test_torchrun_is_stopped_killed_and_goes_on_by_itself(
    tmp_path: Path, torchrun: Callable[..., "subprocess.Popen[str]"]
) -> None:
    """Ctrl-C and SIGTERM leave a checkpoint; a killed worker restarts all and loses nothing: the
    weights are those of two processes that were left alone."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert torchrun(whole).wait(SECONDS) == 0, (whole / "log").read_text()
    log = cut / "log"
    stops = {
        signal.SIGINT: lambda: bool(list(cut.glob("runs/*/checkpoint-000001.json"))),
        signal.SIGTERM: lambda: "resumed after epoch" in log.read_text(),
    }
    for number, it_is_time in stops.items():
        process = torchrun(cut)
        wait_for(it_is_time, process, log)
        process.send_signal(number)
        assert process.wait(SECONDS) != 0
        assert f"stopped by {number.name}" in log.read_text(), log.read_text()
    process = torchrun(cut, "--max-restarts=1")
    wait_for(stops[signal.SIGTERM], process, log)
    os.kill(trainers(process)[1], signal.SIGKILL)
    assert process.wait(SECONDS) == 0, log.read_text()
    assert log.read_text().count("resumed after epoch") == 2
    assert list_versions(cut / "models") == [1]
    assert outcome(cut) == outcome(whole)
