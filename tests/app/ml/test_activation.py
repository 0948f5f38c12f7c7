"""Activation maps: their mean is the logit, whatever the network; and when there is none."""

from pathlib import Path

import pytest
import torch
from tests.support import standin
from tests.support.released import release_forms, release_model

from app.ml.activation import NO_PLACES, NOT_LOADED, MapMaker, SpatialNetwork, as_grid
from app.ml.artifacts import weights_name
from app.ml.model import BACKBONES, build_model
from app.ml.predictor import load_model_for_inference

CLASSES = ["dal", "dosa", "idli"]


@pytest.mark.parametrize("name", ["mobilenet_v2", "timm/resnet18"])
def test_the_mean_over_the_places_is_the_logit(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, 3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(torch.randn(4, 3, 96, 96))  # so that the features are of a usual size
    model.eval()
    images = torch.randn(1, 3, 96, 96)
    network = SpatialNetwork(model, name)
    assert network.fits(96)
    with torch.inference_mode():
        logits = model(images)[0]
    for label in range(3):
        evidence = network.evidence(images, label)
        assert evidence.shape == (3, 3)
        torch.testing.assert_close(
            evidence.mean() + network.linear.bias[label], logits[label], rtol=1e-3, atol=1e-4
        )


def test_every_backbone_of_the_table_has_maps() -> None:
    for name in BACKBONES.keys() - {"mobilenet_v2"}:
        assert SpatialNetwork(build_model(name, 2), name).fits(64), name


def test_a_transformer_has_none_and_says_why() -> None:
    name = "timm/vit_tiny_patch16_224"
    assert not SpatialNetwork(build_model(name, 2), name).fits(224)


def test_a_grid_is_one_at_the_strongest_place_and_never_negative() -> None:
    assert as_grid(torch.tensor([[-2.0, 1.0], [4.0, 0.5]])) == [[0.0, 0.25], [1.0, 0.125]]
    assert as_grid(torch.tensor([[-2.0, -1.0]])) == [[0.0, 0.0]]


def test_the_plain_network_answers_for_each_form(tmp_path: Path) -> None:
    with standin.registered():
        record = release_forms(tmp_path, CLASSES)
        predictor = load_model_for_inference(tmp_path, runtime="int8")
        pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
        found = MapMaker(tmp_path, predictor.record)(pixels, "dosa")
        assert found.grid is not None and max(map(max, found.grid)) <= 1
        assert (len(found.grid), len(found.grid[0])) == (2, 2)
        assert found.side == pytest.approx(32 / 36, abs=1e-4)
        (tmp_path / weights_name(record.version)).unlink()
        gone = MapMaker(tmp_path, record)(pixels, "dosa")
    assert (gone.grid, gone.reason) == (None, NOT_LOADED)


def test_a_network_without_places_is_told_by_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = release_model(tmp_path, CLASSES)
    monkeypatch.setattr(SpatialNetwork, "fits", lambda *_: False)
    found = MapMaker(tmp_path, record)(torch.zeros(3, 224, 224, dtype=torch.uint8), "dal")
    assert (found.grid, found.reason) == (None, NO_PLACES)
