"""Everything that changes while a run trains, which is everything its checkpoints hold."""

import copy
import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from app.ml.model import TrainedPart, dropout_mask
from training.compute.memory import MicroBatch
from training.config import TrainingConfig

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands: epochs done, batches done in the next one, and its sums so far.

    The sums of the latest steps wait on the device in `pending` until somebody reads them: reading
    makes the host wait for the device, which a step must not do.
    """

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    count: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    pending: list[Tensor] = field(default_factory=list)

    def add(self, step: Tensor, seconds: float) -> None:
        """Note one step: (4,) on its device, as `train_step` returns it."""
        self.batch += 1
        self.seconds += seconds
        self.pending.append(step)

    def read(self, total: Callable[..., list[float]]) -> int:
        """Take in the pending steps; return the first batch that was not finite, or 0.

        total: sums each of its arguments over all processes; all of them must call this together.
        """
        first = self.batch - len(self.pending) + 1
        steps = torch.zeros(0, 4, dtype=torch.float64)
        if self.pending:
            steps = torch.stack(self.pending).cpu().double()  # (n, 4)
        self.pending.clear()
        wrong = (steps[:, 3] == 0).nonzero()
        loss_sum, correct, count, num_wrong = total(*steps[:, :3].sum(dim=0).tolist(), len(wrong))
        if num_wrong:
            return first + int(wrong[0]) if len(wrong) else self.batch
        self.loss_sum += loss_sum
        self.correct += round(correct)
        self.count += round(count)
        return 0

    def finish_epoch(self, metrics: dict[str, float]) -> None:
        """Move on to the next epoch; its sums begin at zero."""
        self.history.append(metrics)
        self.epoch, self.batch = self.epoch + 1, 0
        self.loss_sum, self.correct, self.count, self.seconds = 0.0, 0, 0, 0.0

    def state(self) -> dict[str, Any]:
        """Return plain values; nothing may be pending."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        assert not values.pop("pending"), "read() first"
        return copy.deepcopy(values)


@dataclass
class EarlyStopping:
    """The one place that decides which epoch is the best and whether the run should end.

    num_images: that accuracies are measured on; with 0, only equal accuracies are a tie.
    """

    patience: int
    num_images: int = 0
    best_epoch: int = 0
    best_acc: float = -1.0
    best_loss: float = math.inf
    highest_acc: float = -1.0
    lowest_loss: float = math.inf
    epochs_without_lower_loss: int = 0

    def judge(self, epoch: int, val_loss: float, val_acc: float) -> bool:
        """Take in an epoch; True if it is the best: highest accuracy, a tie to the lower loss.

        Accuracies within one standard error of the highest are a tie (Breiman et al. 1984): on 200
        images that is 3 points, and which of ten epochs is the highest by less is luck.
        """
        if val_loss < self.lowest_loss:
            self.lowest_loss, self.epochs_without_lower_loss = val_loss, 0
        else:
            self.epochs_without_lower_loss += 1
        self.highest_acc = max(self.highest_acc, val_acc)
        enough = self.highest_acc - self._standard_error()
        is_best = val_acc >= enough and (val_loss < self.best_loss or self.best_acc < enough)
        if is_best:
            self.best_epoch, self.best_acc, self.best_loss = epoch, val_acc, val_loss
        return is_best

    def _standard_error(self) -> float:
        """Of the highest accuracy, a share of `num_images`."""
        share = self.highest_acc
        return math.sqrt(share * (1 - share) / self.num_images) if self.num_images else 0.0

    @property
    def should_stop(self) -> bool:
        return self.epochs_without_lower_loss >= self.patience


class WeightAverage:
    """An exponential moving average of the trained part, batch-norm statistics included.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that early weights fade fast (as
    in TensorFlow's ExponentialMovingAverage): it looks back over a ninth of all updates at most,
    which in a short run is less than `decay` alone would. With decay 0 it is the trained part.
    """

    def __init__(self, trained: TrainedPart, decay: float) -> None:
        self.trained, self.decay, self.updates = trained, decay, 0
        self.module = copy.deepcopy(trained).requires_grad_(False) if decay else trained

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self.updates += 1
        if not self.decay:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        trained = self.trained.state_dict().values()
        pairs = zip(self.module.state_dict().values(), trained, strict=True)
        floats, values = zip(*((a, v) for a, v in pairs if a.is_floating_point()), strict=True)
        torch._foreach_lerp_(list(floats), list(values), 1 - decay)


@dataclass
class Run:
    """Everything that changes while training, which is everything a checkpoint holds.

    config: with `auto`, `all` and `on` replaced by what they mean here. asked: the settings as they
    were asked for, which a resumed run must repeat. frozen_int8: what the frozen layers compute in
    for training, see `FrozenPart.in_int8`; it is in the checkpoints, as how it was rounded depends
    on the machine that the run began on.
    """

    config: TrainingConfig
    asked: dict[str, Any]
    name: str
    model: nn.Module
    trained: TrainedPart
    average: WeightAverage
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau
    scaler: torch.amp.GradScaler
    early_stopping: EarlyStopping
    warmup_steps: int
    data_fingerprint: str
    micro_batch: MicroBatch
    progress: Progress = field(default_factory=Progress)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # path -> why it could not be read
    weights_sha256: str = ""  # of the file that it began with, if it was one
    frozen_int8: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    @property
    def is_done(self) -> bool:
        return self.progress.epoch >= self.config.epochs or self.early_stopping.should_stop

    @property
    def learning_rate(self) -> float:
        """The rate of the head."""
        return float(self.optimizer.param_groups[0]["lr"])

    def train_mode(self) -> None:
        """Let the trained part behave as in training.

        Its batch-norm keeps the pretrained statistics, as in full fine-tuning of detectors: those
        of a small data set are noisier, and cost 6 points of accuracy (docs/experiments.md).
        """
        self.trained.train()
        if self.config.is_pretrained:
            for module in self.trained.modules():
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    module.eval()

    def dropout_masks(self, positions: Tensor) -> Tensor:
        """Draw (N, num_features) from (seed, epoch, batch), so that a resumed run repeats them.

        positions: (N,) in the whole batch, for all of which they are drawn, whatever share is ours.
        """
        key = (self.config.seed, self.progress.epoch, self.progress.batch)
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
        num_features = self.trained.linear.in_features
        generator = torch.Generator().manual_seed(seed)
        return dropout_mask(self.config.batch_size, num_features, generator)[positions]

    def use_best_weights(self) -> None:
        """Put the weights of the best epoch into the model."""
        self.trained.load_state_dict(self.best_weights)

    def state(self) -> dict[str, Any]:
        """Return the whole run in tensors, numbers, strings, lists and dicts."""
        return {
            "name": self.name,
            "config": self.asked,
            "precision": self.config.precision,
            "sizes": self.config.sizes,
            "small_epochs": self.config.num_small_epochs,
            "weights_sha256": self.weights_sha256,
            "data_fingerprint": self.data_fingerprint,
            "skipped": self.skipped,
            "epoch": self.progress.epoch,
            "batch": self.progress.batch,
            "progress": self.progress.state(),
            "early_stopping": dataclasses.asdict(self.early_stopping),
            "model": plain_copy(self.model.state_dict()),
            "average": plain_copy(self.average.module.state_dict()) if self.average.decay else {},
            "average_updates": self.average.updates,
            "best_weights": self.best_weights,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "micro_batch_size": self.micro_batch.size,
            "frozen_int8": self.frozen_int8,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Become the run whose state this is."""
        if state["precision"] != self.config.precision:
            logger.warning(
                "this run used %s and continues in %s, so rounding differs; pass --precision %s "
                "to match",
                state["precision"],
                self.config.precision,
                state["precision"],
            )
        self.name, self.weights_sha256 = state["name"], state["weights_sha256"]
        self.progress = Progress(**state["progress"])
        self.early_stopping = EarlyStopping(
            **{
                "highest_acc": state["early_stopping"]["best_acc"],  # runs of earlier versions
                **state["early_stopping"],
                "patience": self.config.early_stopping_patience,
            }
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
        self.frozen_int8 = state.get("frozen_int8", self.frozen_int8)  # not in earlier versions
        self.skipped.update(state["skipped"])


def file_sha256(path: Path) -> str | None:
    """Return None where there is no such file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def plain_copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy to the CPU in the usual memory layout, which is how weights are stored."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
