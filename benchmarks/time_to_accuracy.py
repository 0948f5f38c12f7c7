"""How long until this share of the test images is classified correctly, against the usual loop?

    python benchmarks/time_to_accuracy.py --accuracy 0.9             on drawn plates
    python benchmarks/time_to_accuracy.py --accuracy 0.7 --data_dir FOLDER --weights FILE

Both sides of training_speed.py train in turn, an epoch each, until each has reached the accuracy
once or has done --epochs. Testing after each epoch is the same for both and is not timed; our own
validation, which the usual loop lacks, is.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import alternating
import training_speed
from torch import nn

import train_model
from app.ml.predictor import TorchNetwork
from training.config import TrainingConfig
from training.data.splits import Split
from training.release.evaluation import predict_split


class Loop(Protocol):
    def epoch(self) -> int: ...


@dataclass
class Side:
    """One of the two, with its clock."""

    name: str
    loop: Loop
    model: Callable[[], nn.Module]
    seconds: float = 0.0
    epochs: int = 0
    best: float = 0.0

    def train(self) -> None:
        began = time.perf_counter()
        self.loop.epoch()
        self.seconds += time.perf_counter() - began
        self.epochs += 1


def accuracy_of(model: nn.Module, config: TrainingConfig, split: Split) -> float:
    network = TorchNetwork(model, config.model_name, training_speed.CPU)
    found = predict_split(network, split, config.preprocessing, 0, training_speed.CPU)
    return float(found.hits.mean())


def main() -> None:
    parser = training_speed.make_parser(__doc__)
    parser.add_argument("--accuracy", type=float, required=True, help="to reach, 0 to 1")
    parser.add_argument("--epochs", type=int, default=10, help="at most (10)")
    options = parser.parse_args()
    print(alternating.machine())
    with tempfile.TemporaryDirectory() as folder:
        config = training_speed.config_from(options, Path(folder))
        data = train_model.load_data(config)
        ours = training_speed.OurLoop(config, data, Path(folder), validates=True)
        plain = training_speed.PlainLoop(config, data)
        sides = [Side("plain", plain, lambda: plain.model), Side("ours", ours, ours.averaged)]
        while waiting := [
            side for side in sides if side.best < options.accuracy and side.epochs < options.epochs
        ]:
            for side in waiting:
                side.train()
                accuracy = accuracy_of(side.model(), config, data.test)
                side.best = max(side.best, accuracy)
                print(
                    f"{side.name:<6} epoch {side.epochs:>2}  {side.seconds:7.1f} s  "
                    f"test top-1 {accuracy:.3f}",
                    flush=True,
                )
    for side in sides:
        reached = "reached" if side.best >= options.accuracy else "not reached, best"
        print(f"{side.name}: {reached} {side.best:.3f} after {side.seconds:.1f} s")
    print(f"ratio {sides[0].seconds / sides[1].seconds:.1f} x")


if __name__ == "__main__":
    main()
