"""A tiny network and the run that `build_run` makes around it, for what needs no photos."""

from typing import Any

import numpy as np
import torch
from torch import nn

import train_model
from app.ml.model import TrainedPart
from training.config import TrainingConfig
from training.data.splits import FoodData, Split
from training.run.state import Run

CPU = torch.device("cpu")


class Tiny(nn.Module):
    """A network with all there is in a real one: convolution, batch-norm, head."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 4)


def tiny_data() -> FoodData:
    split = Split(("a/1.jpg", "a/2.jpg", "b/1.jpg"), np.array([0, 0, 1]))
    return FoodData({"a": 0, "b": 1}, split, split, split, [], {})


def make_run(**changes: Any) -> Run:
    """A run as `build_run` makes it, around a tiny network."""
    config = TrainingConfig(**{"freeze_layers": 0, **changes})
    torch.manual_seed(config.seed)
    model = Tiny()
    trained = TrainedPart([model.block, nn.AdaptiveAvgPool2d(1)], model.head)
    return train_model.build_run(config, tiny_data(), model, trained, CPU)


def train_steps(run: Run, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    run.trained.train()
    for _ in range(steps):
        images = torch.rand(4, 2, 5, 5, generator=generator)
        run.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(run.trained(images), torch.tensor([0, 1, 2, 3]))
        loss.backward()
        run.optimizer.step()
        run.average.update()


def same(left: Any, right: Any) -> bool:
    """Deeply equal, tensors bit for bit."""
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and left.dtype == right.dtype
            and torch.equal(left, right)
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)
