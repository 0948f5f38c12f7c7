"""Where a run computes, and in which number format."""

import ctypes
import logging
import platform
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

logger = logging.getLogger(__name__)


def reuse_freed_memory(largest_block: int = 1 << 30, at_most: int = (1 << 31) - 1) -> None:
    """Let this process keep the large blocks it frees for its next batch.

    glibc gives them back to the system, which hands them out again page by page, all zeros: that
    was a quarter of the time that an augmented image takes. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # Older ones refuse more than 32 MB; trimming alone would switch their own rule off.
        if libc.mallopt(M_MMAP_THRESHOLD, largest_block) or libc.mallopt(
            M_MMAP_THRESHOLD, 32 << 20
        ):
            libc.mallopt(M_TRIM_THRESHOLD, at_most)


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device asked for if it is there, otherwise the CPU with one line that says so."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    if name in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    if name in ("cuda", "mps"):
        logger.warning("--device %s: there is none here, so the CPU computes", name)
    return torch.device("cpu")


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the arithmetic runs in; "auto" asks the hardware what it has natively."""
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        if features.get("avx512_bf16") or features.get("amx_bf16"):
            return torch.bfloat16  # without the instructions bf16 is slower than fp32
    return torch.float32


def system_facts(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device} ({name})",
        "precision": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }
