"""How fast is a training epoch, end to end, against the usual loop, or against another checkout?

    python benchmarks/training_speed.py                        on drawn plates
    python benchmarks/training_speed.py --data_dir FOLDER --weights FILE
    python benchmarks/training_speed.py --against ../earlier   a clone of an earlier commit

The usual loop is what most tutorials write: torchvision's transforms on PIL images, a DataLoader
with its defaults, fp32, the first layers frozen by requires_grad=False alone. Both sides train
MobileNetV2 (or --model_name) on the same images, batch size 32, in turn, in one process. Each round
is one epoch over --images images. Two checkouts run in a process each.
"""

import argparse
import copy
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import alternating
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import train_model
from app.ml.model import backbone, build_model, load_pretrained, split_model
from app.ml.preprocessing import PreprocessConfig
from training.compute.devices import reuse_freed_memory
from training.compute.distributed import Processes
from training.config import TrainingConfig
from training.data.splits import FoodData, Split
from training.run.checkpointer import Checkpointer
from training.sample.generate import draw_sample

CPU = torch.device("cpu")


def augmentation(preprocessing: PreprocessConfig, crop: int) -> transforms.Compose:
    """Build the transforms of the usual loop: PIL image to standardized tensor."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(crop),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.2, 0.2, 0.2, 0.05),
            transforms.ToTensor(),
            transforms.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )


class PlainImages(Dataset):
    """Opens and transforms each picture anew, as torchvision's own datasets do."""

    def __init__(self, split: Split, transform: transforms.Compose) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = Image.open(self.split.paths[index]).convert("RGB")
        return self.transform(image), int(self.split.labels[index])


class PlainLoop:
    """The usual loop; one call is one epoch."""

    def __init__(self, config: TrainingConfig, data: FoodData) -> None:
        transform = augmentation(config.preprocessing, config.sizes["train_crop"])
        images = PlainImages(data.train, transform)
        self.loader = DataLoader(images, batch_size=config.batch_size, shuffle=True)
        self.model = build_model(config.model_name, len(data.class_to_idx))
        load_pretrained(self.model, config.model_name, config.weights)
        layers = backbone(config.model_name).layers(self.model)
        for _, layer in layers[: int(config.freeze_layers)]:
            layer.requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=config.learning_rate)

    def epoch(self) -> int:
        alternating.usual_memory()
        self.model.train()
        count = 0
        for images, labels in self.loader:
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            count += len(labels)
        return count


class OurLoop:
    """train_model's own epoch, fed by its own sources; one call is one epoch.

    validates: it is a whole training, with validation and with pictures that grow. Else all have
    the size of the last epoch.
    """

    def __init__(
        self,
        config: TrainingConfig,
        data: FoodData,
        folder: Path,
        *,
        device: torch.device = CPU,
        validates: bool = False,
    ) -> None:
        if not validates:
            config = dataclasses.replace(config, small_epochs=0)
        model, frozen, trained = train_model.load_model(config, data.class_to_idx, pretrained=True)
        self.run = train_model.build_run(config, data, model, trained, device)
        self.train_batches, self.val_batches = train_model.build_sources(
            self.run, data, frozen, device, folder, Processes(), is_new=True
        )
        self.frozen = self.train_batches.frozen
        self.checkpointer = Checkpointer(self.run, folder, Processes(), None)
        self.checkpointer.stop.close()  # Ctrl-C is Python's own here
        self.validates = validates

    def epoch(self) -> int:
        run, alone = self.run, Processes()
        reuse_freed_memory()
        with train_model.faster_layers(run, self.frozen):
            train_model.train_epoch(run, run.trained, self.train_batches, self.checkpointer, alone)
        count = run.progress.count
        if not self.validates:
            run.progress.finish_epoch({})
            return count
        loss, accuracy = train_model.validate_epoch(run, self.val_batches, self.checkpointer, alone)
        metrics = {"epoch": run.progress.epoch + 1, "val_loss": loss, "val_acc": accuracy}
        train_model.finish_epoch(run, metrics)
        return count

    def close(self) -> None:
        """End the readers and free the disk space."""
        self.train_batches.close()
        self.val_batches.close()

    def averaged(self) -> nn.Module:
        """Return the network with the weights that would be released."""
        model = copy.deepcopy(self.run.model)
        config = self.run.config
        trained = split_model(model, config.model_name, int(config.freeze_layers))[1]
        trained.load_state_dict(self.run.average.module.state_dict())
        return model


class Child:
    """A side of a benchmark in a process of its own, which answers line by line."""

    def __init__(self, script: str, *arguments: object) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name(script), *self.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, line: str) -> str:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it has ended, which its answer tells
            print(line, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> str:
        """Wait for the next line."""
        assert self.process.stdout
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the side {self.arguments[0]} failed, see above")
        return answer.strip()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def shorten(data: FoodData, images: int) -> FoodData:
    """Keep at most so many training images, of all classes."""
    chosen = np.random.default_rng(0).permutation(len(data.train))[:images]
    train = Split(tuple(data.train.paths[i] for i in chosen), data.train.labels[chosen])
    return FoodData(data.class_to_idx, train, data.val, data.test, data.notes, data.audit)


def make_parser(doc: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """Make the parser of a benchmark that trains."""
    parser = alternating.make_parser(doc, rounds)
    parser.add_argument("--data_dir", type=Path, help="images (default: the drawn sample)")
    parser.add_argument("--weights", default="none", help="none, imagenet or a file (none)")
    parser.add_argument("--model_name", default="mobilenet_v2", help="(mobilenet_v2)")
    return parser


def epoch_parser(doc: str | None) -> argparse.ArgumentParser:
    """Make the parser of a benchmark whose rounds are epochs."""
    parser = make_parser(doc, rounds=5)
    parser.add_argument("--images", type=int, default=320, help="in an epoch (320)")
    return parser


def config_from(options: argparse.Namespace, folder: Path, **settings: Any) -> TrainingConfig:
    """Build the settings of a run that keeps its files in a folder."""
    return TrainingConfig(
        model_name=options.model_name,
        weights=options.weights,
        data_dir=options.data_dir or draw_sample(alternating.REPOSITORY / "data" / "sample"),
        checkpoint_dir=folder,
        **settings,
    )


def against_usual_loop(options: argparse.Namespace, views: int, folder: Path) -> None:
    config = config_from(options, folder, cache_views=views)
    data = shorten(train_model.load_data(config), options.images)
    report(options, views, PlainLoop(config, data).epoch, OurLoop(config, data, folder).epoch)


def against_checkout(options: argparse.Namespace, views: int, folder: Path) -> None:
    config = config_from(options, folder)
    flags = [f"--data_dir={config.data_dir}", f"--images={options.images}"]
    flags += [f"--weights={config.weights}", f"--model_name={config.model_name}"]
    script, against = "epochs_of_checkout.py", options.against.resolve()
    with (
        closing(Child(script, against, folder / "against", views, *flags)) as theirs,
        closing(Child(script, alternating.REPOSITORY, folder / "ours", views, *flags)) as ours,
    ):
        epochs = [lambda side=side: int(side.ask("epoch")) for side in (theirs, ours)]
        report(options, views, *epochs)


def report(
    options: argparse.Namespace, views: int, baseline: Callable[[], int], ours: Callable[[], int]
) -> None:
    result = alternating.compare(baseline, ours, options.rounds)
    name = f"{options.model_name}, {'cached views' if views else 'default'}"
    alternating.report(name, "images/s", result)


def main() -> None:
    parser = epoch_parser(__doc__)
    parser.add_argument("--against", type=Path, help="another checkout, in place of the usual loop")
    options = parser.parse_args()
    print(alternating.machine())
    baseline, compare = "plain", against_usual_loop
    if options.against:
        baseline, compare = "against", against_checkout
    alternating.report_header("images/s of a training epoch", baseline, "ours")
    for views in (0, 1):
        with tempfile.TemporaryDirectory() as folder:
            compare(options, views, Path(folder))


if __name__ == "__main__":
    main()
