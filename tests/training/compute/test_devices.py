"""Where a run computes: what is asked for, what there is, and that everything goes there."""

import logging
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny_runs import Tiny, make_run, train_steps
from torch import nn

from app.ml.model import TrainedPart, build_model
from app.ml.predictor import TorchNetwork
from app.ml.preprocessing import PreprocessConfig
from training.compute import devices
from training.compute.devices import (
    choose_device,
    choose_precision,
    prepare_machine,
    system_facts,
)
from training.compute.features import FrozenPart
from training.compute.memory import MicroBatch
from training.data.loader import Batch
from training.errors import TrainingError

BACKEND = Path(__file__).resolve().parents[3] / "backend"
CONFIG = PreprocessConfig(36, 32, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# "meta" has shapes and no numbers; what is left behind on the CPU fails there as it does on a GPU.
DEVICES = ["cpu", "meta"] + ["cuda"] * torch.cuda.is_available()


def places(module: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in module.state_dict().values()}


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(DEVICES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    num_images=st.integers(1, 4),
    side=st.integers(8, 24),
    augmented=st.booleans(),
)
def test_property_8_everything_lands_on_the_chosen_device(
    name: str, dtype: torch.dtype, num_images: int, side: int, augmented: bool
) -> None:
    device, model = torch.device(name), Tiny()
    first = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    part = FrozenPart(first, CONFIG, device, dtype, MicroBatch(64))
    module = part.module
    pixels = torch.randint(0, 256, (num_images, 3, side, side), dtype=torch.uint8)
    color = torch.zeros(num_images, 4) if augmented else None
    numbers = torch.arange(num_images)
    features = part(Batch(pixels, color, numbers, numbers, []))
    assert (features.device.type, features.dtype) == (name, dtype)
    assert places(module) == {name}
    assert {tensor.dtype for tensor in module.state_dict().values()} == {dtype}
    assert places(first) == {"cpu"}
    trained = TrainedPart([model.block, nn.AdaptiveAvgPool2d(1)], model.head).to(device)
    logits = trained(features.float())
    assert logits.shape == (num_images, 4) and logits.device.type == name
    assert places(trained) == places(model) == {name}  # one set of tensors, moved together
    if name != "meta":
        network = TorchNetwork(build_model("mobilenet_v2", 2), "mobilenet_v2", device)
        assert places(network.model) == {name}
        answers = network(torch.zeros(1, 3, 64, 64))
        assert {answer.device.type for answer in answers} == {"cpu"}  # answers come back


def test_what_trains_is_where_its_average_and_its_moments_are() -> None:
    run = make_run()
    train_steps(run, 1)
    resumed = make_run(seed=1)
    resumed.restore(run.state())
    moments = [value for state in resumed.optimizer.state.values() for value in state.values()]
    assert len(moments) == 3 * len(list(run.trained.parameters()))
    assert {tensor.device.type for tensor in moments} == {"cpu"}
    assert places(resumed.model) == places(resumed.average.module) == {"cpu"}


# Choosing -------------------------------------------------------------------------------------


def with_hardware(
    monkeypatch: pytest.MonkeyPatch,
    *,
    cuda: bool = False,
    mps: bool = False,
    problem: str | None = None,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(devices, "cuda_problem", lambda _: problem)


@pytest.mark.parametrize(
    ("name", "cuda", "mps", "expected"),
    [
        ("auto", True, True, "cuda:1"),
        ("auto", False, True, "mps"),
        ("auto", False, False, "cpu"),
        ("cuda", True, False, "cuda:1"),
        ("mps", True, True, "mps"),
        ("cpu", True, True, "cpu"),
    ],
)
def test_the_device_asked_for_is_taken_if_it_is_there(
    name: str,
    cuda: bool,
    mps: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with_hardware(monkeypatch, cuda=cuda, mps=mps)
    assert choose_device(name, local_rank=1) == torch.device(expected)
    assert not caplog.messages


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_what_is_not_there_falls_back_to_the_cpu_with_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_hardware(monkeypatch)
    assert choose_device(name, 0) == torch.device("cpu")
    (message,) = caplog.messages
    assert f"--device {name}" in message and "CPU" in message and "\n" not in message


OLD_CARD = "GTX 1080 cannot compute with PyTorch 2 (no kernel image is available)"


def test_a_gpu_that_cannot_compute_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An old card, an old driver, all of its memory taken."""
    with_hardware(monkeypatch, cuda=True, problem=OLD_CARD)
    assert choose_device("auto", 0) == torch.device("cpu")
    assert caplog.messages == [f"{OLD_CARD}; using the CPU"]
    with pytest.raises(TrainingError, match=r"--device cuda: GTX 1080 .* use --device cpu"):
        choose_device("cuda", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that computes")
def test_a_gpu_is_tried_with_one_kernel() -> None:
    problem = devices.cuda_problem(torch.device("cuda", 0))
    assert problem and "cannot compute with PyTorch" in problem and "\n" not in problem


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_precision_that_is_asked_for_is_taken(precision: str, device: str) -> None:
    assert choose_precision(precision, torch.device(device)) == precision


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, "fp32"),
        ({"avx512_f": True}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
    ],
)
def test_auto_asks_the_cpu(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision("auto", torch.device("cpu")) == expected
    assert choose_precision("auto", torch.device("mps")) == "fp32"


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_asks_the_gpu(native: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool) -> bool:
        assert not including_emulation
        return native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert choose_precision("auto", torch.device("cuda")) == expected


def test_no_more_threads_than_cores_may_be_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Under a quota of one core, two threads train at a third of the speed of one."""
    caplog.set_level(logging.INFO)
    threads = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(devices, "num_cores", lambda: 1)
        prepare_machine()
        assert torch.get_num_threads() == 1 and "1 of " in caplog.text
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        prepare_machine()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_the_facts_name_device_and_precision(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    facts = system_facts(torch.device("cpu"), "bf16")
    assert facts["device"].startswith("cpu") and facts["precision"] == "bf16"
    assert facts["torch"] == torch.__version__ and facts["threads"] >= 1


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_large_block_that_was_freed_is_used_again() -> None:
    """In a process of its own: minor page faults of ten arrays of 20 MB, one after the other."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(BACKEND)!r})
import numpy
from training.compute.devices import reuse_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        numpy.ones(20 << 20, numpy.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
reuse_freed_memory()
faults()
print(first, faults())
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    plain, kept = map(int, result.stdout.split())
    assert kept < plain / 10
