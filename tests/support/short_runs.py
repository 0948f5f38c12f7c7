"""Short trainings through the real command line, for the tests that stop, starve and resume them.
The fixtures that go with them are in `conftest.py`."""

import collections
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support import standin
from tests.support.runs import arguments
from torch import nn

import train_model
from app.ml.artifacts import state_bytes
from training.data.splits import FoodData
from training.release.release import TrainingResult
from training.run.record import MlflowMirror
from training.run.state import Progress

needs_fork = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL and no fork")
long_only = pytest.mark.skipif(
    "NUTRILEARN_LONG_TESTS" not in os.environ,
    reason="takes a minute or more; set NUTRILEARN_LONG_TESTS=1 to run it",
)
SECONDS = 400  # no process here takes so long unless it hangs
EPOCHS = ("--epochs", "3")


def quick_release(
    model: nn.Module, _data: FoodData, result: TrainingResult, _device: torch.device
) -> SimpleNamespace:
    """In place of the real one, which takes longer than these trainings: the weights alone."""
    folder = result.config.output_dir
    (folder / "food_model_v1").mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    (folder / "food_model_v1.pth").write_bytes(state_bytes(weights))
    metrics = {"test_top1": 1.0, "test_top1_ci95": (0.9, 1.0), "test_top5": 1.0, "test_images": 9}
    metrics |= {"test_balanced_accuracy": 1.0, "best_epoch": result.best_epoch}
    return SimpleNamespace(version=1, metrics=metrics, sha256={}, training={})


def release_quickly() -> None:
    train_model.release_model = quick_release  # type: ignore[assignment]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Which routine computes a sum, and so how it rounds, depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def after(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, act: Callable[[], object]
) -> None:
    """Let the function do `act` after its call of that number."""
    real, calls = getattr(owner, name), 0

    def counting(*values: Any, **named: Any) -> Any:
        nonlocal calls
        result = real(*values, **named)
        calls += 1
        if calls == number:
            act()
        return result

    monkeypatch.setattr(owner, name, counting)


@dataclass
class Cost:
    """Seconds of a run: of all its starts, of training that was done again, from the last signal to
    the end of its process, and of waiting for MLflow."""

    seconds: float = 0.0
    again: float = 0.0
    obeying: float = 0.0
    mirroring: float = 0.0
    starts: int = 0
    batches: set[tuple[int, int]] = field(default_factory=set)


COSTS: dict[Path, Cost] = collections.defaultdict(Cost)  # by the folder of the run


def train(folder: Path, photos: Path, *more: str, tracking_uri: str | None = None) -> int:
    """Note what it costs, too."""
    argv = arguments(photos, folder, *EPOCHS, *more)
    if tracking_uri:
        argv[argv.index("--no_mlflow")] = f"--tracking_uri={tracking_uri}"
    cost, began, add = COSTS[folder], time.perf_counter(), Progress.add
    close = MlflowMirror.close

    def noting(progress: Progress, *values: Any) -> None:
        place = (progress.epoch, progress.batch)
        cost.again += values[-1] * (place in cost.batches)
        cost.batches.add(place)
        add(progress, *values)

    def timed(mirror: MlflowMirror) -> str | None:
        closing = time.perf_counter()
        line = close(mirror)
        cost.mirroring += time.perf_counter() - closing
        return line

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "add", noting)
        patch.setattr(MlflowMirror, "close", timed)
        with standin.registered():
            code = train_model.main(argv)
    ended = time.perf_counter()
    cost.seconds, cost.starts = cost.seconds + ended - began, cost.starts + 1
    if code > 128 and SENT[-1] > began:
        cost.obeying = max(cost.obeying, ended - SENT[-1])
    return code


@contextlib.contextmanager
def costs_said() -> Iterator[None]:
    """Print what the runs inside took: `pytest -rP` shows it."""
    COSTS.clear()
    yield
    for folder, cost in COSTS.items():
        print(  # noqa: T201
            f"{folder.name}: {cost.seconds:.2f} s in {cost.starts} starts, {cost.again:.2f} s of "
            f"training done again, {cost.obeying:.2f} s from signal to end, "
            f"{cost.mirroring:.2f} s of waiting for MLflow"
        )


SENT = [0.0]  # when


def send(number: int) -> Callable[..., None]:
    def send_now(*_: object) -> None:
        SENT.append(time.perf_counter())
        signal.raise_signal(number)

    return send_now


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
