"""A released model as one network that needs nothing beside it, for apps that are not ours.

It takes the pixels of a cropped picture and gives calibrated probabilities and the similarity to
the nearest class, so that an app compares two numbers with two thresholds and has the verdict.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from app.ml.artifacts import ArtifactError, ModelRecord, file_name
from app.ml.predictor import FoodPredictor, nearest_centroid
from app.ml.preprocessing import normalize

INPUT, PROBABILITIES, SIMILARITY = "image", "probabilities", "similarity"
NUM_COMPARED = 8  # pictures on which an exported file must answer as the version does
SAME = 1e-3  # largest difference of an answer in the same precision


class ExportError(ArtifactError):
    """A version that cannot be exported; the message says why."""


class Answers(NamedTuple):
    """probabilities: (N, C). similarity: (N,), of what the head saw to the nearest centroid."""

    probabilities: Tensor
    similarity: Tensor

    def difference(self, other: "Answers") -> float:
        """Return the largest difference in any number; NaN if one is NaN."""
        gaps = [(ours - theirs).abs().max() for ours, theirs in zip(self, other, strict=True)]
        return float(torch.stack(gaps).max())


class StandaloneNetwork(nn.Module):
    """The served network with the pixels before it and the answers behind it."""

    mean: Tensor
    std: Tensor
    centroids: Tensor

    def __init__(self, predictor: FoodPredictor, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        preprocessing = predictor.record.preprocessing
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1))
        self.register_buffer("centroids", predictor.centroids)  # (C, F)
        self.temperature = predictor.decision.temperature

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Map pixels, uint8 (N, H, W, 3), to `Answers`."""
        return self.answers(image.permute(0, 3, 1, 2).float())

    def answers(self, pixels: Tensor) -> dict[str, Tensor]:
        """Map pixels, floats of 0 to 255 (N, 3, H, W), to `Answers`."""
        logits, pooled = self.network((pixels / 255 - self.mean) / self.std)
        directions = nn.functional.normalize(pooled, dim=1)
        similarities = nn.functional.linear(directions, self.centroids)  # (N, C)
        return {
            PROBABILITIES: (logits / self.temperature).softmax(dim=1),
            SIMILARITY: similarities.amax(dim=1),
        }


def facts_of(record: ModelRecord, runtime: str = "torch") -> dict[str, Any]:
    """Return what an app must know beside the network, as JSON knows it.

    The temperature, mean and std are in the network already; they are there to be read.
    """
    decision = record.decision_of(runtime)
    return {
        "name": file_name(record.version, ""),
        "backbone": record.model_name,
        "created": record.created,
        "labels": record.classes,
        "resize": record.preprocessing.resize,
        "crop": record.preprocessing.crop,
        "interpolation": record.preprocessing.interpolation,
        "mean": list(record.preprocessing.mean),
        "std": list(record.preprocessing.std),
        "temperature": decision.temperature,
        "confident_at": decision.confident_at,
        "food_at": decision.food_at,
    }


def pictures(crop: int) -> Tensor:
    """Draw soft random pictures, the same ones each time: uint8 (N, crop, crop, 3)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(NUM_COMPARED, 3, 9, 9, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(crop, crop), mode="bilinear")
    return (255 * smooth).byte().permute(0, 2, 3, 1).contiguous()


def answers_of(predictor: FoodPredictor, images: Tensor) -> Answers:
    """Answer as the server does. images: uint8 (N, crop, crop, 3)."""
    pixels = images.permute(0, 3, 1, 2).contiguous()
    logits, pooled = predictor.network(normalize(pixels, predictor.record.preprocessing))
    probabilities = (logits / predictor.decision.temperature).softmax(dim=1)
    return Answers(probabilities, nearest_centroid(pooled, predictor.centroids))
