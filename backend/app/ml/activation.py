"""Where a network looked: the class activation map (Zhou et al. 2016, arXiv:1512.04150).

Where a network is layers, an average over all places and one linear layer, a logit is the mean over
the places of what each adds to it. That is one product of the last features and the class's row of
weights, and no form but the plain network gives these features.
"""

import logging
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from app.ml.artifacts import ArtifactError, ModelRecord
from app.ml.model import ServedNetwork, backbone, head_linear
from app.ml.predictor import build_released
from app.ml.preprocessing import PreprocessConfig, normalize

NO_PLACES = "this network is not an average over places and one linear layer"
NOT_LOADED = "the plain network of this version cannot be loaded"
DIGITS = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ActivationMap:
    """How much each place speaks for a class: rows from the top, 0 to 1 at the strongest place.

    grid: None where there is none, for a reason. side: of the centered square that the network
    saw and the grid covers, as a share of the upright picture's short side.
    """

    class_name: str
    grid: list[list[float]] | None
    side: float
    reason: str | None = None


class MapMaker:
    """Makes the maps of one version; loads its plain network when first asked. Thread-safe."""

    def __init__(self, model_dir: Path, record: ModelRecord) -> None:
        self.model_dir, self.record = model_dir, record
        self._lock = threading.Lock()
        self._network: SpatialNetwork | None = None
        self._problem: str | None = None

    def __call__(self, pixels: Tensor, class_name: str) -> ActivationMap:
        """Map one preprocessed picture, uint8 (3, crop, crop)."""
        config = self.record.preprocessing
        side = seen_side(config)
        network = self._loaded()
        if network is None:
            return ActivationMap(class_name, None, side, self._problem)
        images = normalize(pixels.unsqueeze(0), config)
        evidence = network.evidence(images, self.record.class_to_idx[class_name])
        return ActivationMap(class_name, as_grid(evidence), side)

    def _loaded(self) -> "SpatialNetwork | None":
        with self._lock:
            if self._network is None and self._problem is None:
                try:
                    model = build_released(self.model_dir, self.record)
                except (ArtifactError, OSError) as error:
                    logger.warning("no activation maps: %s", error)
                    self._problem = NOT_LOADED
                    return None
                network = SpatialNetwork(model, self.record.model_name)
                if network.fits(self.record.preprocessing.crop):
                    self._network = network
                else:
                    self._problem = NO_PLACES
            return self._network


class SpatialNetwork:
    """A network up to its pool, and the linear layer behind it."""

    def __init__(self, model: nn.Module, model_name: str) -> None:
        model.eval().requires_grad_(False)
        self.layers = nn.Sequential(*(layer for _, layer in backbone(model_name).layers(model)))
        self.linear = head_linear(model, model_name)
        self._whole = ServedNetwork(model, model_name)

    @torch.inference_mode()
    def fits(self, size: int) -> bool:
        """Whether the average over the places is what the head sees, tried on one picture."""
        images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        _, pooled = self._whole(images)
        try:
            features = self.layers(images)
        except Exception:  # noqa: BLE001  layers that are no chain may raise anything
            return False
        if not isinstance(features, Tensor) or features.ndim != 4:
            return False
        mean = features.mean(dim=(2, 3))
        return mean.shape == pooled.shape and torch.allclose(mean, pooled, rtol=1e-3, atol=1e-4)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Compute the last features of one normalized image, (1, 3, H, W): (num_features, h, w)."""
        features: Tensor = self.layers(images)[0]
        return features

    def evidence(self, images: Tensor, label: int) -> Tensor:
        """Compute what each place adds to a class's logit, which is their mean plus the bias.

        images: normalized (1, 3, H, W). Returns (h, w).
        """
        return torch.einsum("c,chw->hw", self.linear.weight[label], self.features(images))


def seen_side(config: PreprocessConfig) -> float:
    """Return the side of the centered square that a network sees, as a share of the short side."""
    return round(config.crop / config.resize, 4)


def as_grid(evidence: Tensor) -> list[list[float]]:
    """Scale to 1 at the strongest place; what speaks against the class is 0."""
    positive = evidence.clamp(min=0)
    scaled = positive / positive.max().clamp(min=1e-12)
    return [[round(value, DIGITS) for value in row] for row in scaled.tolist()]
