"""Short runs of the real command line on drawn photos: their flags, what they leave, and processes
that kill themselves at a chosen moment."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tests.support import standin

REPOSITORY = Path(__file__).resolve().parents[2]
BACKEND = REPOSITORY / "backend"
COLORS = {"green": (60, 170, 60), "red": (190, 60, 60), "sky": (70, 90, 200)}
EXACT = ("epoch", "train_loss", "train_acc", "val_loss", "val_acc", "learning_rate")


def draw_photos(folder: Path, per_class: int = 14, noise: float = 60, seed: int = 0) -> Path:
    """Class folders of noisy colored JPEGs, 64 pixels wide."""
    rng = np.random.default_rng(seed)
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = np.array(color) + rng.normal(0, noise, (64, 64, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / name / f"{number:02d}.jpg", quality=85)
    return folder


def arguments(photos: Path, folder: Path, *more: str) -> list[str]:
    """The flags of a short run whose files all go into one folder."""
    small = ("--weights", "none", "--freeze_layers", "2", "--batch_size", "8", "--epochs", "4")
    small = ("--model_name", standin.NAME, *small)
    plain = ("--device", "cpu", "--num_workers", "0", "--no_mlflow")
    places = ("--data_dir", photos, "--output_dir", folder / "models")
    return [*map(str, places), "--checkpoint_dir", str(folder / "runs"), *small, *plain, *more]


@dataclass
class Outcome:
    """What a run left: the weights' SHA-256 and the exact numbers of each epoch."""

    weights: str
    history: list[tuple[float, ...]]


def outcome(folder: Path) -> Outcome:
    (weights,) = (folder / "models").glob("food_model_v?.pth")
    # A run that is killed before its first checkpoint leaves an empty folder and begins anew.
    (finished,) = (folder / "runs").glob("*/finished.json")
    lines = (finished.parent / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    history = [tuple(e[name] for name in EXACT) for e in events if e["event"] == "epoch"]
    return Outcome(hashlib.sha256(weights.read_bytes()).hexdigest(), history)


# One process ----------------------------------------------------------------------------------


@dataclass
class Trap:
    """Counts the moments of one kind that a process passes, and kills it at one of them.

    signals: what to send to itself then, in this order.
    """

    kind: str
    number: int
    signals: tuple[int, ...] = (signal.SIGKILL,)
    passed: int = 0

    def __call__(self, kind: str) -> None:
        if kind == self.kind:
            self.passed += 1
            if self.passed == self.number:
                for number in self.signals:
                    os.kill(os.getpid(), number)


class HalfWritten:
    """A file in which each write has a moment in its middle."""

    def __init__(self, file: Any, trap: Trap) -> None:
        self.file, self.trap = file, trap

    def write(self, data: bytes) -> None:
        half = len(data) // 2
        self.file.write(data[:half])
        self.file.flush()
        self.trap(kind_of(self.file.name))
        self.file.write(data[half:])

    def __enter__(self) -> "HalfWritten":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def kind_of(file: object) -> str:
    """checkpoint, record or release, by the name of a file or the number of an open one."""
    if isinstance(file, int):
        file = os.readlink(f"/proc/self/fd/{file}") if Path("/proc/self/fd").exists() else ""
    name = Path(os.fsdecode(file)).name  # type: ignore[arg-type]
    if "checkpoint-" in name:
        return "checkpoint"
    return "record" if name == "metrics.jsonl" else "release"


def set_trap(trap: Trap) -> None:
    """Let the moments of this process pass through the trap."""
    import train_model
    from training.compute.features import FeatureStore

    real = {name: getattr(os, name) for name in ("replace", "fsync", "unlink")}
    real["open"] = Path.open

    def replace(source: Any, target: Any) -> None:
        trap(kind_of(target))
        real["replace"](source, target)
        trap(kind_of(target))

    def fsync(number: int) -> None:
        trap(kind_of(number))
        real["fsync"](number)

    def unlink(path: Any, **options: Any) -> None:
        trap(kind_of(path))
        real["unlink"](path, **options)

    def open_path(path: Path, mode: str = "r", *values: Any, **named: Any) -> Any:
        file = real["open"](path, mode, *values, **named)
        return HalfWritten(file, trap) if mode == "xb" else file

    os.replace, os.fsync, os.unlink = replace, fsync, unlink  # type: ignore[assignment]
    Path.open = open_path  # type: ignore[assignment, method-assign]
    for owner, name, kind in [
        (train_model, "gradients", "train"),
        (train_model, "predict_logits", "validate"),
        (FeatureStore, "put", "validate"),
        (train_model, "log_epoch", "epoch end"),
    ]:
        setattr(owner, name, _passing(getattr(owner, name), trap, kind))


def _passing(function: Any, trap: Trap, kind: str) -> Any:
    def passing(*values: Any, **named: Any) -> Any:
        result = function(*values, **named)
        trap(kind)
        return result

    return passing


def live(
    argv: list[str],
    log: Path,
    trap: Trap | None,
    save_seconds: float,
    prepare: Callable[[], object],
) -> None:
    """The body of one process: the command line, its output in a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    import train_model
    from training.run import checkpointer

    standin.register()
    torch.set_num_threads(1)
    checkpointer.CHECKPOINT_SECONDS = save_seconds  # type: ignore[assignment]
    checkpointer.READ_SECONDS = 0  # type: ignore[assignment]
    checkpointer.AGREE_BATCHES = 1  # type: ignore[assignment]
    prepare()
    if trap:
        set_trap(trap)
    code = train_model.main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def start(
    argv: list[str],
    log: Path,
    trap: Trap | None = None,
    save_seconds: float = 0.3,
    prepare: Callable[[], object] = bool,
) -> BaseProcess:
    """Run the command line in a new process, forked from one that has imported everything.

    prepare: called in the new process first; must be found by its name there.
    """
    os.environ.setdefault("PYTHONPATH", os.pathsep.join([str(BACKEND), str(REPOSITORY)]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_model", "training.release.release"])
    process = context.Process(target=live, args=(argv, log, trap, save_seconds, prepare))
    process.start()
    return process
