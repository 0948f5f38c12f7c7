"""Where a run computes, and in which number format."""

import ctypes
import logging
import os
import platform
from typing import Any

import torch
from torch import Tensor

from app.ml.machine import num_cores
from training.errors import TrainingError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_KEPT_BLOCK, KEPT_BYTES = 1 << 30, (1 << 31) - 1

logger = logging.getLogger(__name__)


def prepare_machine() -> None:
    """Compute on the cores that are ours, and keep freed memory for the next batch.

    More threads than cores stall each other: under a quota of one core, two threads train at a
    third of the speed of one. OMP_NUM_THREADS, where it is set, is somebody's decision.
    """
    cores = num_cores()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)
        logger.info("using %d of %d cores", cores, os.cpu_count() or 1)
    reuse_freed_memory()


def reuse_freed_memory() -> None:
    """Let this process keep the large blocks it frees for its next batch.

    glibc gives them back to the system, which hands them out again page by page, all zeros: that
    was a quarter of the time that an augmented image takes. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # Older ones refuse more than 32 MB; trimming alone would switch their own rule off.
        if libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK) or libc.mallopt(
            M_MMAP_THRESHOLD, 32 << 20
        ):
            libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def choose_device(name: str, local_rank: int) -> torch.device:
    """Return the device asked for; auto: the fastest that can compute.

    Raises:
        TrainingError: a GPU was asked for that is there but cannot compute.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        if (problem := cuda_problem(device)) is None:
            return device
        if name == "cuda":
            raise TrainingError(f"--device cuda: {problem}; use --device cpu, or another build")
        logger.warning("%s; using the CPU", problem)
    if name in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    if name == "mps" or (name == "cuda" and not torch.cuda.is_available()):
        logger.warning("--device %s: not available; using the CPU", name)
    return torch.device("cpu")


def cuda_problem(device: torch.device) -> str | None:
    """Try one kernel and say why it fails, if it does.

    A card that this PyTorch was not built for, or whose memory is taken, is there all the same.
    """
    try:
        torch.ones(8, device=device).sum().item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{_gpu_name(device)} cannot compute with PyTorch {torch.__version__} ({reason})"
    return None


def _gpu_name(device: torch.device) -> str:
    try:
        return torch.cuda.get_device_name(device)
    except (RuntimeError, AssertionError):
        return f"the GPU {device}"


def choose_precision(precision: str, device: torch.device) -> str:
    """Return fp32, bf16 or fp16; "auto" asks the hardware what it has natively."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        if features.get("avx512_bf16") or features.get("amx_bf16"):
            return "bf16"  # without the instructions bf16 is slower than fp32
    return "fp32"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting; CUDA can do that from pinned memory only."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def autocast(features: Tensor) -> torch.autocast:
    """Autocast to the features' dtype; nothing changes for fp32."""
    is_low = features.dtype != torch.float32
    dtype = features.dtype if is_low else torch.bfloat16  # fp32 would be refused, though unused
    return torch.autocast(features.device.type, dtype, enabled=is_low)


def system_facts(device: torch.device, precision: str) -> dict[str, Any]:
    """Describe what a run computes on, for its record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device} ({name})",
        "precision": precision,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }
