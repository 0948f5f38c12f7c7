"""Padding as for pictures of one size: the same features, and nothing to compute in a file."""

import io

import onnx
import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from app.ml.model import build_model
from training.compute.padding import fix_padding
from training.release.export import onnx_bytes


@pytest.mark.parametrize("crop", [7, 8, 9])
def test_the_features_are_the_same(crop: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        Conv2dSame(3, 4, 3, stride=2), Conv2dSame(4, 4, 5, stride=2, groups=4), nn.Conv2d(4, 2, 1)
    )
    images = torch.rand(2, 3, crop, crop + 1)[..., :crop]
    expected = network(images)
    fix_padding(network, crop)
    torch.testing.assert_close(network(images), expected)


def test_a_file_computes_no_sizes() -> None:
    torch.manual_seed(0)
    data = onnx_bytes(build_model("efficientnet_lite0", 3).eval(), "efficientnet_lite0", 64)
    operators = {node.op_type for node in onnx.load(io.BytesIO(data)).graph.node}
    assert "Pad" in operators and not operators & {"Shape", "Ceil", "Div"}, operators
