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
from tests.training.run.test_state import Tiny, make_run, train_steps
from torch import nn

from app.ml.model import TrainedPart, build_model, inference_copy
from app.ml.predictor import TorchNetwork
from app.ml.preprocessing import PreprocessConfig
from training.compute.devices import choose_device, choose_dtype, system_facts
from training.compute.features import FrozenPart
from training.data.loader import Batch
from training.run.state import MicroBatch

BACKEND = Path(__file__).resolve().parents[3] / "backend"
CONFIG = PreprocessConfig(36, 32, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# "meta" has shapes and no numbers; what is left behind on the CPU fails there as it does on a GPU.
DEVICES = ["cpu", "meta"] + ["cuda"] * torch.cuda.is_available()


def places(module: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in module.state_dict().values()}


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
    module = inference_copy(first, device, dtype)
    part = FrozenPart(module, CONFIG, device, dtype, MicroBatch(64))
    pixels = torch.randint(0, 256, (num_images, 3, side, side), dtype=torch.uint8)
    color = torch.zeros(num_images, 4) if augmented else None
    numbers = torch.arange(num_images)
    features = part(Batch(pixels, color, numbers, numbers, []))
    assert (features.device.type, features.dtype) == (name, dtype)
    assert places(module) == {name}
    assert {tensor.dtype for tensor in module.state_dict().values()} == {dtype}
    assert places(first) == {"cpu"}
    trained = TrainedPart([model.block], model.head).to(device)
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
    monkeypatch: pytest.MonkeyPatch, *, cuda: bool = False, mps: bool = False
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


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


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_precision_that_is_asked_for_is_taken(
    precision: str, dtype: torch.dtype, device: str
) -> None:
    assert choose_dtype(precision, torch.device(device)) == dtype


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({}, torch.float32),
        ({"avx512_f": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
    ],
)
def test_auto_asks_the_cpu(
    capabilities: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_dtype("auto", torch.device("cpu")) == dtype
    assert choose_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_asks_the_gpu(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def supported(including_emulation: bool) -> bool:
        assert not including_emulation
        return native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert choose_dtype("auto", torch.device("cuda")) == dtype


def test_the_facts_name_device_and_precision(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    facts = system_facts(torch.device("cpu"), torch.bfloat16)
    assert facts["device"].startswith("cpu") and facts["precision"] == "bfloat16"
    assert facts["torch"] == torch.__version__ and facts["threads"] >= 1


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
