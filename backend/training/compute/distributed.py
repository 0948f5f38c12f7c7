"""One run on several processes (torchrun): the same batches, sums and statistics as on one.

Each process takes its share of every batch. Losses are divided by the size of the whole batch,
batch-norm sees the whole batch, and every count is summed over the processes. An update exchanges
the gradients and nothing else.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from app.ml.model import activation_of
from training.compute.forwards import replaced_forwards
from training.errors import TrainingError

Value = TypeVar("Value")

RESUME_HINT = "; --resume auto continues from the last checkpoint, if one was written"
TRAINING_TIMEOUT = timedelta(minutes=10)  # after which a process that hangs ends the run
MAIN_TIMEOUT = timedelta(hours=3)  # the main process may download 5 GB first


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is; rank 0 alone writes and reports.

    patient: a group of the same processes with a longer timeout.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    patient: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sum each value over all processes."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, *values: float) -> list[float]:
        """Take the maximum of each value over all processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: tuple[float, ...], operation: Any) -> list[float]:
        if self.world_size == 1:
            return list(values)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total, operation)
        return total.tolist()

    def from_main(self, make: Callable[[], Value]) -> Value:
        """Return, in all processes, what make() returns in the main one.

        Raises:
            Exception: in all of them, what make() raised.
        """
        if self.world_size == 1:
            return make()
        values: list[Any] = [None, None]
        if self.is_main:
            try:
                values[0] = make()
            except Exception as error:  # noqa: BLE001  # raised again below, by every process
                values[1] = error
        dist.broadcast_object_list(values, src=0, group=self.patient)
        if values[1] is not None:
            raise values[1]
        return values[0]

    def merged(self, facts: dict[str, str]) -> dict[str, str]:
        """Merge the facts of all processes."""
        gathered = [facts] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(gathered, facts)
        return {name: fact for part in gathered for name, fact in part.items()}

    def leave(self) -> None:
        """Wait for the others, then leave."""
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()


def join_processes(device: str) -> Processes:
    """Join the processes that torchrun started; alone where it did not. device: as --device.

    Raises:
        TrainingError: a launcher's variables are not all there, or make no sense; more processes
            than GPUs.
    """
    world_size = asked_world_size()
    if world_size == 1:
        return Processes()
    _check_launcher(world_size)
    local_rank = _from_environment("LOCAL_RANK", "0")
    uses_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if uses_gpu:
        _check_gpus(local_rank)
        torch.cuda.set_device(local_rank)
    backend = "nccl" if uses_gpu else "gloo"
    store, rank, _ = next(dist.rendezvous("env://"))
    # torchrun keeps its store when it starts killed processes again: the addresses are stale.
    own = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        backend, store=own, rank=rank, world_size=world_size, timeout=TRAINING_TIMEOUT
    )
    patient = dist.new_group(timeout=MAIN_TIMEOUT, backend="gloo")
    return Processes(rank, world_size, local_rank, patient)


def asked_world_size() -> int:
    """Return how many processes torchrun started; 1 where it did not.

    Raises:
        TrainingError: the environment names no whole number.
    """
    return _from_environment("WORLD_SIZE", "1")


def _from_environment(name: str, default: str) -> int:
    text = os.environ.get(name) or default
    if not text.isdecimal():
        raise TrainingError(f"{name}={text} in the environment: must be a whole number; unset it")
    return int(text)


def _check_launcher(world_size: int) -> None:
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise TrainingError(
            f"WORLD_SIZE={world_size} is in the environment, but not {', '.join(missing)}: start "
            "with torchrun, or unset WORLD_SIZE to train in one process"
        )
    _from_environment("MASTER_PORT", "0")
    _from_environment("LOCAL_WORLD_SIZE", "1")
    rank = _from_environment("RANK", "0")
    if rank >= world_size:  # the others would wait for a process that is none of theirs
        raise TrainingError(
            f"RANK={rank} in the environment: must be below WORLD_SIZE={world_size}; start with "
            "torchrun, or unset both"
        )


def _check_gpus(local_rank: int) -> None:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise TrainingError(
            f"process {local_rank + 1} of this machine has no GPU of its own (there are {count}); "
            f"use --nproc_per_node={count}, or --device cpu"
        )


@contextlib.contextmanager
def losses_explained(hint: str = RESUME_HINT) -> Iterator[None]:
    """Turn what torch raises, anywhere, when another process dies into a TrainingError."""
    try:
        yield
    except RuntimeError as error:
        lines = str(error).splitlines() or [""]
        if "DataLoader" in lines[0]:
            line = lines[-1] if lines[0].startswith("Caught") else lines[0]
            raise TrainingError(
                f"a process that reads images died or hangs ({line}); if memory is short, lower "
                f"--num_workers, in Docker use --shm-size=1g{hint}"
            ) from error
        is_torch = type(error) is RuntimeError or type(error).__name__.startswith("Dist")
        if is_torch and dist.is_available() and dist.is_initialized():
            raise TrainingError(
                f"the processes of this run lost each other ({lines[0]}){hint}"
            ) from error
        raise


@contextlib.contextmanager
def shared_gradients(module: nn.Module, processes: Processes) -> Iterator[nn.Module]:
    """Provide the module to call in training: gradients are averaged over the processes, and
    batch-norm sees the whole batch."""
    if processes.world_size == 1:
        yield module
        return
    synced = [
        (child, functools.partial(synced_batch_norm, child))
        for child in module.modules()
        if isinstance(child, nn.BatchNorm2d) and "forward" not in vars(child)  # else it is folded
    ]
    with replaced_forwards(synced):
        with warnings.catch_warnings():
            # Its successor, forward_sync_buffers, came after the oldest torch we run on.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            shared = DistributedDataParallel(module, broadcast_buffers=False)
        yield shared


def synced_batch_norm(norm: nn.BatchNorm2d, images: Tensor) -> Tensor:
    """norm(images) with the statistics of all processes' images, on any device.

    torch's own SyncBatchNorm runs on GPUs only.
    """
    activation = activation_of(norm)
    assert norm.running_mean is not None and norm.running_var is not None
    if not norm.training:
        eval_norm = nn.functional.batch_norm(
            images, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
        return activation(eval_norm)
    values = images.float()
    count = values.new_tensor([values.numel() / values.shape[1]])
    sums = _SumOverProcesses.apply(torch.cat([values.sum((0, 2, 3)), count]))
    count = sums[-1]
    mean = sums[:-1] / count
    # Around the mean: the difference of two large sums would lose half of the digits.
    centred = values - mean.view(1, -1, 1, 1)
    variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
    with torch.no_grad():
        assert norm.momentum is not None and norm.num_batches_tracked is not None
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
    scale = norm.weight * (variance + norm.eps).rsqrt()
    result = centred * scale.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    return activation(result.to(images.dtype))


class _SumOverProcesses(torch.autograd.Function):
    """Every process gets the sum; what flows back to each is the sum of all gradients."""

    @staticmethod
    def forward(ctx, values):  # type: ignore[no-untyped-def]  # noqa: ARG004
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]  # noqa: ARG004
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total
