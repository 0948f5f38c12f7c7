"""Depthwise convolutions whose backward pass is computed in float32, on CPUs that train in bf16.

oneDNN has no good bf16 kernel for two of these gradients: of the input with stride 2, and of a
5x5 weight. Measured with torch 2.14 on an AVX-512 BF16 CPU, batch 32: 55 instead of 1.2 ms for
576 channels at 14x14, 65 instead of 9 ms for 1,152 channels at 7x7.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.compute.forwards import replaced_forwards


@contextlib.contextmanager
def float32_gradients(
    module: nn.Module, device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """Inside, the depthwise convolutions that would be slow compute their gradients in float32."""
    wanted = device.type == "cpu" and dtype == torch.bfloat16
    slow = [c for c in module.modules() if wanted and isinstance(c, nn.Conv2d) and _is_slow(c)]
    with replaced_forwards([(conv, functools.partial(_forward, conv)) for conv in slow]):
        yield


def _is_slow(conv: nn.Conv2d) -> bool:
    depthwise = conv.groups == conv.in_channels == conv.out_channels > 1
    slow = conv.stride[0] > 1 or conv.kernel_size[0] > 3
    plain = conv.dilation == (1, 1) and not isinstance(conv.padding, str)
    return depthwise and slow and plain and (type(conv) is nn.Conv2d or pads_by_itself(conv))


def pads_by_itself(conv: nn.Conv2d) -> bool:
    """Whether it is timm's Conv2dSame, which pads as TensorFlow does."""
    from timm.layers import Conv2dSame

    return type(conv) is Conv2dSame


def _forward(conv: nn.Conv2d, images: Tensor) -> Tensor:
    padding = conv.padding
    if type(conv) is not nn.Conv2d:  # Conv2dSame
        from timm.layers import pad_same

        images = pad_same(images, list(conv.kernel_size), list(conv.stride))
        padding = (0, 0)
    result = _DepthwiseConv.apply(images, conv.weight, conv.stride, padding)
    return result if conv.bias is None else result + conv.bias.bfloat16().view(-1, 1, 1)


class _DepthwiseConv(torch.autograd.Function):
    """Forward in bf16, backward in float32; weight (C, 1, k, k), no dilation."""

    @staticmethod
    def forward(ctx, images, weight, stride, padding):  # type: ignore[no-untyped-def]
        images = images.bfloat16()
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        groups = weight.shape[0]
        return F.conv2d(images, weight.bfloat16(), None, stride, padding, groups=groups)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        images, weight = ctx.saved_tensors
        image_gradient, weight_gradient, _ = torch.ops.aten.convolution_backward(
            gradient.float(),
            images.float(),
            weight,
            None,
            ctx.stride,
            ctx.padding,
            (1, 1),
            False,
            (0, 0),
            weight.shape[0],
            (ctx.needs_input_grad[0], True, False),
        )
        if image_gradient is not None:
            image_gradient = image_gradient.to(images.dtype)
        return image_gradient, weight_gradient, None, None
