"""Batch-norm over the images of all processes is torch's own batch-norm over the whole batch; and
how long the processes wait for each other."""

import copy
import os
import re
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from training.compute import distributed
from training.compute.distributed import synced_batch_norm
from training.errors import TrainingError

pytestmark = pytest.mark.slow

SHARES = [(3, 3), (4, 3), (2, 0)]  # even, odd, one has none


def batch(size: int) -> torch.Tensor:
    images = torch.randn(size, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    return images * 0.3 + 2


def norm() -> nn.BatchNorm2d:
    torch.manual_seed(1)
    layer = nn.BatchNorm2d(5)
    nn.init.normal_(layer.weight)
    return layer


def one_of_two(rank: int, port: int, folder: str) -> None:
    """Run in a process: what came of each test is left in the folder."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    distributed.TRAINING_TIMEOUT = timedelta(seconds=1)  # type: ignore[assignment]
    processes = distributed.join_processes("cpu")
    for shares in SHARES:
        torch.save(one_share(rank, shares), f"{folder}/{shares}.{rank}.pt")
    value = processes.from_main(lambda: time.sleep(2) or "what took long")
    assert (value, processes.sum(1.0)) == ("what took long", [2.0])
    if rank == 1:
        time.sleep(3)  # hangs in a step
        return
    try:
        processes.sum(1.0)
    except RuntimeError as error:
        Path(folder, "hung.txt").write_text(str(error))


def one_share(rank: int, shares: tuple[int, int]) -> list[torch.Tensor]:
    """The share's outputs, gradients and statistics."""
    layer, whole = norm(), batch(sum(shares))
    images = whole.split(list(shares))[rank].clone().requires_grad_()
    output = synced_batch_norm(layer, images)
    (output**3).sum().backward()
    for parameter in layer.parameters():
        dist.all_reduce(parameter.grad)
    result = [output.detach(), images.grad, layer.weight.grad, layer.bias.grad]
    return [*result, layer.running_mean, layer.running_var]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind; starting them takes most of the time."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.start_processes(one_of_two, (port, str(folder)), nprocs=2, start_method="spawn")
    return folder


@pytest.mark.parametrize("shares", SHARES)
def test_batch_norm_sees_the_whole_batch(shares: tuple[int, int], left: Path) -> None:
    layer, images = copy.deepcopy(norm()), batch(sum(shares)).requires_grad_()
    output = layer(images)
    (output**3).sum().backward()
    first, second = (torch.load(left / f"{shares}.{rank}.pt") for rank in (0, 1))
    assert layer.running_mean is not None and layer.running_var is not None
    torch.testing.assert_close(torch.cat([first[0], second[0]]), output.detach())
    torch.testing.assert_close(torch.cat([first[1], second[1]]), images.grad, rtol=1e-4, atol=1e-5)
    whole = [layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]
    for got, expected in zip(first[2:], whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29599"}


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "x"}, "RANK=x in the environment: must be a whole number"),
        ({"RANK": "2"}, "RANK=2 in the environment: must be below WORLD_SIZE=2"),
        ({"MASTER_PORT": "tcp"}, "MASTER_PORT=tcp in the environment: must be a whole number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 in the environment: must be a whole number"),
        ({"LOCAL_WORLD_SIZE": "2(x2)"}, "LOCAL_WORLD_SIZE=2(x2) in the environment: must be"),
    ],
)
def test_variables_that_make_no_sense_are_told_and_nothing_is_waited_for(
    environment: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**LAUNCHED, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=re.escape(says)):
        distributed.join_processes("cpu")


def test_more_processes_than_gpus_are_told_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {**LAUNCHED, "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(TrainingError, match=r"process 2 .* \(there are 1\); .*per_node=1"):
        distributed.join_processes("auto")


def test_what_main_prepares_is_waited_for_and_a_process_that_hangs_is_not(left: Path) -> None:
    assert "timed out" in (left / "hung.txt").read_text().lower()
