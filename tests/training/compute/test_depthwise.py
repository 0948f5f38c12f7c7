"""Depthwise convolutions give the same results, and nearly the same gradients, as without the
detour through float32; others are left alone."""

import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import nn

from training.compute.depthwise import float32_gradients

CPU = torch.device("cpu")
DEPTHWISE = {
    "stride 2": nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False),
    "5 x 5": nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False),
    "7 x 7 with bias": nn.Conv2d(8, 8, 7, padding=3, groups=8),
    "padded as TensorFlow does": Conv2dSame(8, 8, 5, stride=2, groups=8, bias=False),
}
OTHERS = {
    "two outputs a channel": nn.Conv2d(8, 16, 5, padding=2, groups=8),
    "dilated": nn.Conv2d(8, 8, 5, padding=4, dilation=2, groups=8),
    "weights standardized": ScaledStdConv2d(8, 8, 5, padding=2, groups=8),
    "padding in a word": nn.Conv2d(8, 8, 5, padding="same", groups=8),
}


def results(conv: nn.Conv2d, dtype: torch.dtype, detour: bool) -> list[torch.Tensor]:
    """Output and gradients: of the images, the weight and the bias."""
    images = torch.rand(2, 8, 12, 12, generator=torch.Generator().manual_seed(0)) - 0.5
    images.requires_grad_(True)
    conv.zero_grad()
    with (
        float32_gradients(conv, CPU, torch.bfloat16 if detour else torch.float32),
        torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16),
    ):
        output = conv(images)
    output.float().square().sum().backward()
    gradients = [images.grad, *(parameter.grad for parameter in conv.parameters())]
    return [output.detach().float(), *(g.clone() for g in gradients if g is not None)]


@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_convolutions_compute_the_same(name: str) -> None:
    conv = DEPTHWISE[name]
    detoured = results(conv, torch.bfloat16, detour=True)
    for given, plain in zip(detoured, results(conv, torch.float32, detour=False), strict=True):
        torch.testing.assert_close(given, plain, atol=0.02 * float(plain.abs().max()), rtol=0)


@pytest.mark.parametrize("name", [*DEPTHWISE, *OTHERS])
def test_only_those_that_it_computes_right_take_the_detour(name: str) -> None:
    conv = (DEPTHWISE | OTHERS)[name]
    with float32_gradients(conv, CPU, torch.bfloat16):
        assert ("forward" in vars(conv)) == (name in DEPTHWISE)
    assert "forward" not in vars(conv)
