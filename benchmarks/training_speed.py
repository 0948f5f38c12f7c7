"""How fast is a training epoch, end to end, against the usual loop?

    python benchmarks/training_speed.py                        on drawn plates
    python benchmarks/training_speed.py --data_dir FOLDER --weights FILE

The baseline is what most tutorials write: torchvision's transforms on PIL images, a DataLoader
with its defaults, fp32, the first layers frozen by requires_grad=False alone. Both train
MobileNetV2 (or --model_name) on the same images, batch 32, in turn, in one process. Each round is
one epoch over --images images.
"""

import argparse
import copy
import tempfile
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
from training.compute.depthwise import float32_gradients
from training.compute.devices import reuse_freed_memory
from training.compute.distributed import Processes
from training.compute.features import feature_sources
from training.config import TrainingConfig
from training.data.splits import FoodData, Split
from training.run.resume import Keeper

CPU = torch.device("cpu")


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
        recipe = backbone(config.model_name).preprocessing
        transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(recipe["crop"]),
                transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(0.2, 0.2, 0.2, 0.05),
                transforms.ToTensor(),
                transforms.Normalize(recipe["mean"], recipe["std"]),
            ]
        )
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
    """train_model's own epoch, fed by its own sources; one call is one epoch."""

    def __init__(
        self, config: TrainingConfig, data: FoodData, folder: Path, *, validates: bool = False
    ) -> None:
        self.run, frozen = train_model.build_run(config, data, CPU)
        self.source, self.val = feature_sources(
            config, data, frozen, folder, CPU, Processes(), self.run.micro_batch
        )
        self.keeper = Keeper(self.run, folder, Processes(), None)
        self.validates = validates

    def epoch(self) -> int:
        run = self.run
        reuse_freed_memory()
        with float32_gradients(run.trained, CPU, self.source.frozen.dtype):
            train_model.train_epoch(run, run.trained, self.source, self.keeper, Processes())
        count = run.progress.count
        if self.validates:
            train_model.validate_epoch(run, self.val, self.keeper, Processes())
        run.progress.finish_epoch({})
        return count

    def averaged(self) -> nn.Module:
        """The network with the weights that would be released."""
        model = copy.deepcopy(self.run.model)
        config = self.run.config
        trained = split_model(model, config.model_name, int(config.freeze_layers))[1]
        trained.load_state_dict(self.run.average.module.state_dict())
        return model


def shorten(data: FoodData, images: int) -> FoodData:
    """The same data with at most so many training images, of all classes."""
    chosen = np.random.default_rng(0).permutation(len(data.train))[:images]
    train = Split(tuple(data.train.paths[i] for i in chosen), data.train.labels[chosen])
    return FoodData(data.class_to_idx, train, data.val, data.test, data.notes, data.audit)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--weights", default="none")
    parser.add_argument("--model_name", default="mobilenet_v2")


def epoch_parser(doc: str) -> argparse.ArgumentParser:
    """The flags of a benchmark whose rounds are epochs."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    add_data_flags(parser)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5)
    return parser


def config_from(options: argparse.Namespace, folder: Path, **settings: Any) -> TrainingConfig:
    place = {"data_dir": options.data_dir} if options.data_dir else {"sample": True}
    return TrainingConfig(
        model_name=options.model_name,
        weights=options.weights,
        checkpoint_dir=folder,
        **{**place, **settings},
    )


def main() -> None:
    options = epoch_parser(__doc__).parse_args()
    print(alternating.machine())
    print(f"{'images/s of a training epoch':<44} {'plain':>9} {'ours':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for views in (0, 1):
            config = config_from(options, Path(folder), cache_views=views)
            data = shorten(train_model.load_data(config), options.images)
            ours = OurLoop(config, data, Path(folder) / f"views-{views}")
            plain = PlainLoop(config, data)
            result = alternating.compare(plain.epoch, ours.epoch, options.rounds)
            name = f"{options.model_name}, {'cached views' if views else 'default'}"
            alternating.report(name, "images/s", result)


if __name__ == "__main__":
    main()
