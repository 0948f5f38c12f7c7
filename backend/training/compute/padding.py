"""Padding that depends on the size of the picture, for networks that see one size only."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.compute.depthwise import pads_by_itself


@torch.no_grad()
def fix_padding(network: nn.Module, crop: int) -> None:
    """Let timm's convolutions that pad as TensorFlow's do it as for pictures of this size.

    In an ONNX file they would compute it with each answer, which takes time; and in INT8 that is
    rounded as well, which moves EfficientNet-Lite0's features by half of their length.
    """
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    special = [conv for conv in convs if type(conv) is not nn.Conv2d and pads_by_itself(conv)]
    if not special:
        return
    hooks = [conv.register_forward_pre_hook(_fix) for conv in special]
    network(torch.zeros(1, 3, crop, crop))
    for hook in hooks:
        hook.remove()


def _fix(conv: Any, inputs: tuple[Tensor, ...]) -> None:
    from timm.layers.padding import get_same_padding

    sides = zip(inputs[0].shape[-2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
    height, width = (get_same_padding(*side) for side in sides)
    padding = (width // 2, width - width // 2, height // 2, height - height // 2)
    conv.forward = functools.partial(_convolve, conv, padding)


def _convolve(conv: nn.Conv2d, padding: tuple[int, ...], images: Tensor) -> Tensor:
    padded = F.pad(images, padding)
    return F.conv2d(padded, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)
