"""Batch-norm over the images of all processes is torch's own batch-norm over the whole batch."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from training.distributed import synced_batch_norm

SHARES = {"even": (3, 3), "odd": (4, 3), "one has none": (2, 0)}


def batch(size: int) -> torch.Tensor:
    images = torch.randn(size, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    return images * 0.3 + 2


def norm() -> nn.BatchNorm2d:
    torch.manual_seed(1)
    layer = nn.BatchNorm2d(5)
    nn.init.normal_(layer.weight)
    return layer


def one_share(rank: int, shares: tuple[int, int], folder: str) -> None:
    """Run in a process: the share's outputs, gradients and statistics, saved as `rank`.pt."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    layer, whole = norm(), batch(sum(shares))
    images = whole.split(list(shares))[rank].clone().requires_grad_()
    output = synced_batch_norm(layer, images)
    (output**3).sum().backward()
    for parameter in layer.parameters():
        dist.all_reduce(parameter.grad)
    result = [output.detach(), images.grad, layer.weight.grad, layer.bias.grad]
    torch.save([*result, layer.running_mean, layer.running_var], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_batch_norm_sees_the_whole_batch(shares: tuple[int, int], tmp_path: Path) -> None:
    mp.start_processes(one_share, (shares, str(tmp_path)), nprocs=2, start_method="spawn")
    layer, images = copy.deepcopy(norm()), batch(sum(shares)).requires_grad_()
    output = layer(images)
    (output**3).sum().backward()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert layer.running_mean is not None and layer.running_var is not None
    torch.testing.assert_close(torch.cat([first[0], second[0]]), output.detach())
    torch.testing.assert_close(torch.cat([first[1], second[1]]), images.grad, rtol=1e-4, atol=1e-5)
    whole = [layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]
    for got, expected in zip(first[2:], whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
