"""One side of `time_to_accuracy.py`: trains an epoch for each line on standard input.

    epochs_of_side.py SIDE FOLDER --seed N --epochs N FLAGS...

Says `ready` when all is imported, and after each epoch `trained` and the accuracy on a line each.
Building the side belongs to its first epoch. FOLDER is for its files.

The peers get what our recipe found, where they have it: timm's loop the frozen layers, the rates,
the smoothed labels and the average of the weights, beside its own cosine schedule and AdamW; fastai
has a recipe of its own, with the crops and the loss of its Imagenette example.
"""

import argparse
import importlib
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import training_speed
from accuracy import photos_of
from timm.data import ImageDataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, freeze
from torch import nn

import train_model
from app.ml.machine import num_cores
from app.ml.model import (
    backbone,
    build_model,
    head_linear,
    imagenet_sizes_of,
    inference_copy,
    load_pretrained,
)
from app.ml.preprocessing import PreprocessConfig, normalize
from training.compute.devices import choose_precision
from training.config import TrainingConfig
from training.data.splits import FoodData, Split
from training.release.evaluation import read_images

CPU = torch.device("cpu")
SCORED_AT_ONCE = 32


class Turns:
    """Lets a side train when it is its turn, and scores it after each epoch."""

    def __init__(self, photos: Split, answers: TextIO) -> None:
        self.photos, self.answers = photos, answers
        self.images = torch.empty(0)

    def wait(self) -> None:
        """Return when this side is to train an epoch."""
        if not sys.stdin.readline():
            sys.exit()  # the benchmark has ended

    def end_epoch(self, model: nn.Module, preprocessing: PreprocessConfig) -> None:
        """Say that the epoch is over, and how accurate the network is now; wait for the next."""
        self.say("trained")
        self.say(f"{self.accuracy(model, preprocessing):.6f}")
        self.wait()

    def say(self, line: str) -> None:
        print(line, file=self.answers, flush=True)

    def accuracy(self, model: nn.Module, preprocessing: PreprocessConfig) -> float:
        """Compute top-1 on the photos, which are decoded once."""
        if not len(self.images):
            self.images = read_images(self.photos.paths, preprocessing)
        if len(self.images) < len(self.photos):
            sys.exit(f"{len(self.photos) - len(self.images)} photos to score cannot be read")
        network = inference_copy(model, CPU, torch.float32, preprocessing.crop)
        answers = []
        with torch.inference_mode():
            for batch in self.images.split(SCORED_AT_ONCE):
                pixels = normalize(batch, preprocessing)
                answers.append(network(pixels.to(memory_format=torch.channels_last)).argmax(dim=1))
        return float(np.mean(torch.cat(answers).numpy() == self.photos.labels))


def train_plain(config: TrainingConfig, data: FoodData, turns: Turns) -> None:
    loop = training_speed.PlainLoop(config, data)
    for _ in range(config.epochs):
        loop.epoch()
        turns.end_epoch(loop.model, config.preprocessing)


def train_ours(config: TrainingConfig, data: FoodData, turns: Turns) -> None:
    loop = training_speed.OurLoop(config, data, config.checkpoint_dir, validates=True)
    for _ in range(config.epochs):
        loop.epoch()
        turns.end_epoch(loop.averaged(), config.preprocessing)


def pretrained(config: TrainingConfig, data: FoodData) -> nn.Module:
    """Build the network that every side starts from."""
    model = build_model(config.model_name, len(data.class_to_idx))
    load_pretrained(model, config.model_name, config.weights)
    return model


# timm -------------------------------------------------------------------------------------------


def train_timm(config: TrainingConfig, data: FoodData, turns: Turns) -> None:
    """Train as timm's train.py does, which its package leaves out, with timm's own parts."""
    model = pretrained(config, data).to(memory_format=torch.channels_last)
    for _, layer in backbone(config.model_name).layers(model)[: int(config.freeze_layers)]:
        freeze(layer)
    loader = timm_loader(config, data)
    optimizer = timm_optimizer(config, model)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=config.epochs,
        warmup_epochs=int(config.warmup_epochs),
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    average = ModelEmaV3(model, decay=1 - 1 / (2 * len(loader)), use_warmup=True)
    criterion = LabelSmoothingCrossEntropy(config.label_smoothing)
    has_bf16 = choose_precision("auto", CPU) == "bf16"
    for epoch in range(config.epochs):
        model.train()
        for number, (images, labels) in enumerate(loader, start=1 + epoch * len(loader)):
            with torch.autocast(CPU.type, torch.bfloat16, enabled=has_bf16):
                logits = model(images.contiguous(memory_format=torch.channels_last))
                loss = criterion(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model, step=number)
            scheduler.step_update(number)
        turns.end_epoch(average.module, config.preprocessing)


def timm_loader(config: TrainingConfig, data: FoodData) -> Any:
    preprocessing = config.preprocessing
    images = list(zip(data.train.paths, data.train.labels.tolist(), strict=True))
    return create_loader(
        ImageDataset("", reader=images),
        (3, preprocessing.crop, preprocessing.crop),
        config.batch_size,
        is_training=True,
        scale=(config.min_crop_scale, 1.0),
        mean=preprocessing.mean,
        std=preprocessing.std,
        num_workers=num_cores(),
        device=CPU,
    )


def timm_optimizer(config: TrainingConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Make AdamW, with a smaller rate for the pretrained layers in timm's way."""
    head = list(head_linear(model, config.model_name).parameters())
    of_head = {id(parameter) for parameter in head}
    body = [p for p in model.parameters() if p.requires_grad and id(p) not in of_head]
    groups: list[dict[str, Any]] = [
        {"params": body, "lr_scale": config.backbone_lr_scale},
        {"params": head},
    ]
    return create_optimizer_v2(groups, "adamw", lr=config.learning_rate)


# fastai -----------------------------------------------------------------------------------------


def train_fastai(config: TrainingConfig, data: FoodData, turns: Turns) -> None:
    """Fine-tune with fastai: an epoch of the head alone, then all of the network in one cycle."""
    from fastai.vision import all as fastai

    model = pretrained(config, data)

    class InTurn(fastai.Callback):
        def after_epoch(self) -> None:
            turns.end_epoch(model, config.preprocessing)

    def split(model: nn.Module) -> list[list[nn.Parameter]]:
        """Group as fastai does for its own networks: half of the body, the rest of it, the head."""
        layers = [layer for _, layer in backbone(config.model_name).layers(model)]
        first, last = layers[: len(layers) // 2], layers[len(layers) // 2 :]
        parts = first, last, [head_linear(model, config.model_name)]
        return [[p for module in part for p in module.parameters()] for part in parts]

    learner = fastai.Learner(
        fastai_loaders(config, data),
        model,
        loss_func=fastai.LabelSmoothingCrossEntropy(),
        splitter=split,
        cbs=[fastai.ChannelsLast(), InTurn()],  # its bf16 is for CUDA alone
    )
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(config.epochs - 1)


def fastai_loaders(config: TrainingConfig, data: FoodData) -> Any:
    from fastai.vision import all as fastai

    preprocessing = config.preprocessing
    return fastai.ImageDataLoaders.from_lists(
        config.checkpoint_dir,
        list(data.train.paths),
        [data.classes[label] for label in data.train.labels],
        valid_pct=0,
        y_block=fastai.CategoryBlock(vocab=data.classes, sort=False),
        item_tfms=[
            fastai.RandomResizedCrop(preprocessing.crop, min_scale=0.35),
            fastai.FlipItem(0.5),
        ],
        batch_tfms=fastai.Normalize.from_stats(preprocessing.mean, preprocessing.std),
        bs=config.batch_size,
        device=CPU,
    )


# ------------------------------------------------------------------------------------------------

SIDES: dict[str, Callable[[TrainingConfig, FoodData, Turns], None]] = {
    "plain": train_plain,
    "ours": train_ours,
    "timm": train_timm,
    "fastai": train_fastai,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what the benchmark and its sides both know."""
    parser.add_argument("--epochs", type=int, default=10, help="of each side (10)")
    parser.add_argument("--score", type=Path, help="other photos, class folders (the test split)")


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print too
    parser = training_speed.make_parser(__doc__)
    add_flags(parser)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    config = training_speed.config_from(
        options, options.folder, seed=options.seed, epochs=options.epochs
    )
    if options.side != "ours":
        config = config.with_sizes(imagenet_sizes_of(config.model_name))
    data = train_model.load_data(config)
    photos = photos_of(options.score, data.class_to_idx) if options.score else data.test
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(options.seed)
    if options.side == "fastai":
        importlib.import_module("fastai.vision.all")  # optional; importing it is not timed
    turns = Turns(photos, answers)
    turns.say("ready")
    turns.wait()
    SIDES[options.side](config, data, turns)


if __name__ == "__main__":
    main()
