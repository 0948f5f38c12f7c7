"""Time two ways of doing one thing in turn, in one process, and print how they compare."""

import argparse
import ctypes
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "backend"))

from app.ml.machine import num_cores
from training.compute.devices import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def make_parser(doc: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """Make a parser whose help is the benchmark's docstring; rounds: the default of --rounds."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"of both sides ({rounds})")
    return parser


def usual_memory() -> None:
    """Let malloc behave as it does by default once it has seen large blocks, for a baseline."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)


def machine() -> str:
    """Name the processor and the versions that the numbers belong to."""
    bf16 = "with" if torch.cpu.get_capabilities().get("avx512_bf16") else "without"
    return (
        f"{_processor()}, {num_cores()} cores, {bf16} bf16 instructions; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def compare(
    baseline: Callable[[], int],
    ours: Callable[[], int],
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    rest: float = 0,
) -> tuple[float, float, float]:
    """Run both in turn; each returns how many items it did.

    clock: `time.thread_time` leaves out what others do meanwhile, if one thread does all.
    rest: seconds before each turn, in which threads of the other side go to sleep.

    Returns items/s of the baseline and of ours (medians), and the median of the rounds' ratios.
    """
    rates: tuple[list[float], list[float]] = ([], [])
    for number in range(-warm_up, rounds):
        for side, work in zip(rates, (baseline, ours), strict=True):
            time.sleep(rest)
            began = clock()
            items = work()
            if number >= 0:
                side.append(items / (clock() - began))
    ratios = [b / a for a, b in zip(*rates, strict=True)]
    return statistics.median(rates[0]), statistics.median(rates[1]), statistics.median(ratios)


def report_header(name: str, baseline: str, ours: str) -> None:
    print(f"{name:<44} {baseline:>9} {ours:>9}", flush=True)


def report(name: str, unit: str, result: tuple[float, float, float]) -> None:
    baseline, ours, ratio = result
    print(f"{name:<44} {baseline:9.1f} {ours:9.1f} {unit}   {ratio:5.2f} x", flush=True)
