"""Time two ways of doing one thing in turn, in one process, and print how they compare."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "backend"))


def usual_memory() -> None:
    """Let malloc behave as it does by itself after some large blocks, for a baseline's turn."""
    from training.compute.devices import reuse_freed_memory

    reuse_freed_memory(32 << 20, 64 << 20)


def machine() -> str:
    """The processor and the versions that the numbers belong to."""
    names = [
        line.split(":", 1)[1].strip()
        for line in _cpu_info()
        if line.startswith("model name") and ":" in line
    ]
    bf16 = "with" if torch.cpu.get_capabilities().get("avx512_bf16") else "without"
    cores = os.cpu_count()
    return (
        f"{names[0] if names else platform.processor()}, {cores} cores, {bf16} bf16 instructions; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def compare(
    baseline: Callable[[], int], ours: Callable[[], int], rounds: int, warm_up: int = 1
) -> tuple[float, float, float]:
    """Run both in turn; each returns how many items it did.

    Returns:
        items/s of the baseline and of ours (medians), and the median of the rounds' ratios.
    """
    rates: tuple[list[float], list[float]] = ([], [])
    for number in range(-warm_up, rounds):
        for side, work in zip(rates, (baseline, ours), strict=True):
            began = time.perf_counter()
            items = work()
            if number >= 0:
                side.append(items / (time.perf_counter() - began))
    ratios = [b / a for a, b in zip(*rates, strict=True)]
    return statistics.median(rates[0]), statistics.median(rates[1]), statistics.median(ratios)


def report(name: str, unit: str, result: tuple[float, float, float]) -> None:
    baseline, ours, ratio = result
    print(f"{name:<44} {baseline:9.1f} {ours:9.1f} {unit}   {ratio:5.2f} x", flush=True)
