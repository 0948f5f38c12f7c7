"""A small stand-in backbone, for trainings whose contract is not what the network can do.

It has all that the real ones have: convolutions, batch-norm, a head, layers to freeze; and it
trains an epoch of small pictures in a tenth of a second.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from app.ml.model import BACKBONES, DROPOUT, Backbone

NAME = "standin"
WIDTHS = (16, 32, 48, 64)


class StandIn(nn.Module):
    """Four blocks, a pool, dropout and a linear head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in zip((3, *WIDTHS), WIDTHS, strict=False)
        )
        self.classifier = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(WIDTHS[-1], num_classes))

    def forward(self, images: Any) -> Any:
        for block in self.blocks:
            images = block(images)
        return self.classifier(images.mean((2, 3)))


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Make it a backbone of this process for a while; one that is there stays as it is."""
    had = NAME in BACKBONES
    if not had:
        register()
    try:
        yield
    finally:
        if not had:
            del BACKBONES[NAME]


def register() -> None:
    """Make it a backbone of this process."""
    BACKBONES[NAME] = Backbone(
        build=StandIn,
        layers=lambda model: [(f"block {i}", b) for i, b in enumerate(model.blocks, start=1)],
        head="classifier.1",
        preprocessing={
            "resize": 36,
            "crop": 32,
            "interpolation": "bilinear",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        imagenet=dict,
    )
