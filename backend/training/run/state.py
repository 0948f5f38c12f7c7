"""Everything that changes while a run trains, which is everything its checkpoints hold."""

import copy
import dataclasses
import hashlib
import json
import logging
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from app.ml.model import TrainedPart
from training.compute.devices import DTYPES, choose_dtype
from training.config import TrainingConfig
from training.data.splits import FoodData, Split
from training.errors import TrainingError

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands: epochs done, batches done in the next one, and its sums so far."""

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    count: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def add(self, loss_sum: float, correct: float, count: float, seconds: float) -> None:
        self.batch += 1
        self.seconds += seconds
        self.loss_sum += loss_sum
        self.correct += int(correct)
        self.count += int(count)

    def finish_epoch(self, metrics: dict[str, float]) -> None:
        self.history.append(metrics)
        self.epoch, self.batch = self.epoch + 1, 0
        self.loss_sum, self.correct, self.count, self.seconds = 0.0, 0, 0, 0.0


@dataclass
class Verdict:
    """The one place that decides which epoch is the best and whether the run should end."""

    patience: int
    best_epoch: int = 0
    best_acc: float = -1.0
    best_loss: float = math.inf
    lowest_loss: float = math.inf
    epochs_without_lower_loss: int = 0

    def judge(self, epoch: int, val_loss: float, val_acc: float) -> bool:
        """Take in an epoch; True if it is the best: highest accuracy, at a tie lower loss."""
        if val_loss < self.lowest_loss:
            self.lowest_loss, self.epochs_without_lower_loss = val_loss, 0
        else:
            self.epochs_without_lower_loss += 1
        is_best = (val_acc, -val_loss) > (self.best_acc, -self.best_loss)
        if is_best:
            self.best_epoch, self.best_acc, self.best_loss = epoch, val_acc, val_loss
        return is_best

    @property
    def should_stop(self) -> bool:
        return self.epochs_without_lower_loss >= self.patience


class WeightAverage:
    """A running average of the trained part, batch-norm statistics included.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that early weights fade fast
    (as in TensorFlow's ExponentialMovingAverage): it looks back over a ninth of all updates at
    most, which in a short run is less than decay alone would. With decay 0 it is the trained part.
    """

    def __init__(self, trained: TrainedPart, decay: float) -> None:
        self.trained, self.decay, self.updates = trained, decay, 0
        self.module = copy.deepcopy(trained).requires_grad_(False) if decay else trained

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        if not self.decay:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        trained = self.trained.state_dict().values()
        pairs = zip(self.module.state_dict().values(), trained, strict=True)
        floats, values = zip(*((a, v) for a, v in pairs if a.is_floating_point()), strict=True)
        torch._foreach_lerp_(list(floats), list(values), 1 - decay)


@dataclass
class MicroBatch:
    """How many images go through the network at once: half as many each time memory runs out."""

    size: int

    def parts(self, num_images: int) -> list[slice]:
        """At least one, which is empty where there are no images."""
        return [slice(i, i + self.size) for i in range(0, max(num_images, 1), self.size)]

    def map(self, compute: Callable[[slice], Tensor], num_images: int) -> Tensor:
        """What compute gives for each part, together: (num_images, ...)."""
        while True:
            try:
                results = [compute(part) for part in self.parts(num_images)]
                return results[0] if len(results) == 1 else torch.cat(results)
            except RuntimeError as error:
                self.halve(error)

    def halve(self, error: RuntimeError) -> None:
        """Answer an error that says that memory ran out; any other is raised again.

        Raises:
            TrainingError: there is no memory for a single image.
        """
        if not is_out_of_memory(error):
            raise error
        if self.size == 1:
            raise TrainingError(
                "there is not enough memory for a single image; close other programs, freeze more "
                "layers (--freeze_layers) or take a smaller --model_name"
            ) from error
        self.size = -(-self.size // 2)
        logger.warning(
            "memory ran out: images now go through the network %d at a time; each step still "
            "learns from a whole batch",
            self.size,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """A GPU's allocator has its own error; the CPU's only has its words."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@dataclass
class Run:
    """Everything that changes while training, which is everything a checkpoint holds."""

    config: TrainingConfig
    name: str
    model: nn.Module
    trained: TrainedPart
    average: WeightAverage
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau
    scaler: torch.amp.GradScaler
    verdict: Verdict
    warmup_steps: int
    data_fingerprint: str
    packed_data: Tensor
    micro_batch: MicroBatch
    progress: Progress = field(default_factory=Progress)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # path -> why it could not be read
    weights_sha256: str = ""  # of the file that it began with, if it was one

    def __post_init__(self) -> None:
        self.weights_sha256 = file_sha256(Path(self.config.weights)) or ""

    @property
    def precision(self) -> str:
        """What "auto" means here: fp32, bf16 or fp16."""
        device = next(self.model.parameters()).device
        dtype = choose_dtype(self.config.precision, device)
        return next(name for name, named in DTYPES.items() if named == dtype)

    @property
    def is_done(self) -> bool:
        return self.progress.epoch >= self.config.epochs or self.verdict.should_stop

    def train_mode(self) -> None:
        """Let the trained part behave as in training; batch-norm keeps its pretrained statistics
        unless the run is told to train them, or has none."""
        self.trained.train()
        if self.config.batch_norm == "fixed" and self.config.weights != "none":
            for module in self.trained.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    def state(self) -> dict[str, Any]:
        """The whole run in tensors, numbers, strings, lists and dicts."""
        return {
            "name": self.name,
            "config": self.config.exact_settings(),
            "precision": self.precision,
            "weights_sha256": self.weights_sha256,
            "data_fingerprint": self.data_fingerprint,
            "packed_data": self.packed_data,
            "left_out": self.left_out,
            "epoch": self.progress.epoch,
            "batch": self.progress.batch,
            "progress": dataclasses.asdict(self.progress),
            "verdict": dataclasses.asdict(self.verdict),
            "model": plain_copy(self.model.state_dict()),
            "average": plain_copy(self.average.module.state_dict()) if self.average.decay else {},
            "average_updates": self.average.updates,
            "best_weights": self.best_weights,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "micro_batch_size": self.micro_batch.size,
        }

    def restore(self, state: dict[str, Any]) -> None:
        if state["precision"] != self.precision:
            logger.warning(
                "this run computed in %s so far and goes on in %s, with other rounding; "
                "--precision %s keeps to the first",
                state["precision"],
                self.precision,
                state["precision"],
            )
        self.name, self.weights_sha256 = state["name"], state["weights_sha256"]
        self.progress = Progress(**state["progress"])
        self.verdict = Verdict(
            **{**state["verdict"], "patience": self.config.early_stopping_patience}
        )
        self.model.load_state_dict(state["model"])
        if self.average.decay:
            self.average.module.load_state_dict(state["average"])
        self.average.updates = state["average_updates"]
        self.best_weights = state["best_weights"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if state["scaler"]:  # empty from a device that needs none
            self.scaler.load_state_dict(state["scaler"])
        self.micro_batch.size = state["micro_batch_size"]
        self.left_out.update(state["left_out"])


def file_sha256(path: Path) -> str | None:
    """None where there is no such file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def plain_copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy on the CPU in the usual memory layout, which is how weights are stored."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }


def fingerprint(data: FoodData) -> str:
    """Changes when any image is added, removed, relabelled or moved between the splits."""
    digest = hashlib.sha256(json.dumps(data.class_to_idx, sort_keys=True).encode())
    for split in (data.train, data.val, data.test):
        names = (f"{Path(p).parent.name}/{Path(p).name}" for p in split.paths)
        digest.update("\n".join(names).encode("utf-8", "surrogateescape"))
        digest.update(split.labels.tobytes())
    return digest.hexdigest()


def pack_data(data: FoodData) -> Tensor:
    """The lists of images, small enough for each checkpoint: uint8 (n,)."""
    values = dataclasses.asdict(data)
    for part in ("train", "val", "test"):
        values[part]["labels"] = values[part]["labels"].tolist()
    packed = zlib.compress(json.dumps(values).encode(), level=1)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def unpack_data(packed: Tensor) -> FoodData:
    values = json.loads(zlib.decompress(packed.numpy().tobytes()))
    for part in ("train", "val", "test"):
        labels = np.array(values[part]["labels"], dtype=np.int64)
        values[part] = Split(tuple(values[part]["paths"]), labels)
    return FoodData(**values)
