"""How does a GPU do? Run it on one and paste the output.

    python benchmarks/gpu.py                         some 8 minutes on a GPU
    python benchmarks/gpu.py --short --device cpu    the same in small, to see that it works

Prints the images/s of an update against the usual loop and against timm's way (both compute all
layers; ours and timm's in the same precision), what an update waits for, what SIGKILL costs, how
memory that runs out is met, and what the server's network answers. Drawn plates, random weights.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import alternating
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_speed import OurLoop

import train_model
from app.ml.artifacts import list_versions, read_record, read_state
from app.ml.model import BACKBONES, backbone, build_model
from app.ml.predictor import load_model_for_inference
from app.ml.preprocessing import normalize
from training.compute.devices import DTYPES
from training.compute.distributed import Processes
from training.compute.features import FeatureBatch
from training.config import TrainingConfig
from training.data.loader import Batch
from training.data.splits import FoodData
from training.sample.generate import draw_sample

SCRIPT = alternating.REPOSITORY / "backend" / "train_model.py"
LONGEST_SECONDS = 300  # of one training


class Reads(TorchDispatchMode):
    """Counts values that are read back from the device."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, values: Any = (), named: Any = None
    ) -> Any:
        self.count += "_local_scalar_dense" in str(function)
        return function(*values, **(named or {}))


# Images/s of an update --------------------------------------------------------------------------


class Pictures:
    """A batch of random pictures, with all that the three ways of an update need of them."""

    def __init__(self, number: int, config: TrainingConfig, num_classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        crop = config.sizes["train_crop"]
        shape = (number, 3, crop, crop)
        self.config = config.preprocessing
        self.pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.color = torch.rand(number, 4, generator=generator) * 2 - 1
        self.labels = torch.randint(0, num_classes, (number,), generator=generator)
        self.order = torch.arange(number)


class WholeNetwork:
    """The usual update; `precision` and channels-last make it timm's."""

    def __init__(
        self, config: TrainingConfig, num_classes: int, device: torch.device, precision: str
    ) -> None:
        layout = torch.contiguous_format if precision == "fp32" else torch.channels_last
        self.device, self.dtype, self.layout = device, DTYPES[precision], layout
        self.model = build_model(config.model_name, num_classes).to(device)
        self.model.to(memory_format=layout)
        for _, layer in backbone(config.model_name).layers(self.model)[: int(config.freeze_layers)]:
            layer.requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=config.learning_rate)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.model.train()

    def update(self, batch: Pictures) -> None:
        images = normalize(batch.pixels.to(self.device), batch.config)
        labels = batch.labels.to(self.device)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(images.contiguous(memory_format=self.layout))
            loss = nn.functional.cross_entropy(logits, labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


class Ours:
    """The update of train_model.py, its frozen part included."""

    def __init__(self, loop: OurLoop) -> None:
        self.loop, self.alone = loop, Processes()
        loop.run.train_mode()

    def update(self, batch: Pictures) -> Tensor:
        run, frozen = self.loop.run, self.loop.frozen
        features = frozen(Batch(batch.pixels, batch.color, batch.order, batch.order, []))
        ready = FeatureBatch(features, batch.labels, batch.order, len(batch.labels))
        with train_model.faster_layers(run, frozen):
            return train_model.train_step(run, run.trained, ready, self.alone)


def repeated(
    update: Callable[[Pictures], object], batch: Pictures, repeats: int, device: torch.device
) -> Callable[[], int]:
    def run() -> int:
        for _ in range(repeats):
            update(batch)
        wait_for(device)
        return repeats * len(batch.labels)

    return run


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def throughput(bench: "Bench") -> None:
    for precision in bench.precisions:
        print(f"\nimages/s of an update, {precision}{'':<12} {'other':>19} {'ours':>9}")
        for name in bench.model_names:
            for size in bench.batch_sizes:
                throughput_of(bench, name, size, precision)


def throughput_of(bench: "Bench", name: str, size: int, precision: str) -> None:
    device, classes = bench.device, len(bench.data.class_to_idx)
    config = bench.config(model_name=name, batch_size=size, precision=precision)
    ours = Ours(bench.loop(config))
    batch = Pictures(size, config, classes)
    for title, other_precision in (("usual loop, fp32", "fp32"), (f"timm, {precision}", precision)):
        other = WholeNetwork(config, classes, device, other_precision)
        works = [repeated(side.update, batch, bench.repeats, device) for side in (other, ours)]
        result = alternating.compare(works[0], works[1], bench.rounds)
        alternating.report(f"{name}, batch {size}: {title}", "images/s", result)
    ours.loop.close()


# What an update waits for -----------------------------------------------------------------------


def waiting(bench: "Bench") -> None:
    loop = bench.loop(bench.config())
    for _ in range(2):  # the first makes the small copies
        began, waited = time.perf_counter(), loop.train_batches.seconds_waiting
        count = loop.epoch()
        seconds = time.perf_counter() - began
    share = (loop.train_batches.seconds_waiting - waited) / seconds
    print(
        f"\nan epoch from files: {count / seconds:.0f} images/s with "
        f"{loop.run.config.num_workers} readers, "
        f"{share:.0%} of it waiting for images"
    )
    ours, updates = Ours(loop), bench.updates
    config = loop.run.config
    batch = Pictures(config.batch_size, config, len(bench.data.class_to_idx))
    ours.update(batch)
    with Reads() as reads, waits_told(bench.device) as told:
        for _ in range(updates):
            ours.update(batch)
    print(
        f"in {updates} updates: {reads.count} values read back, "
        f"{len(told)} waits for the device told by CUDA"
    )
    for line in sorted({str(each.message).splitlines()[0] for each in told}):
        print(f"    {line}")
    loop.close()


@contextmanager
def waits_told(device: torch.device) -> Iterator[list[warnings.WarningMessage]]:
    """Collect a warning for each call that makes the host wait for a GPU."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        yield told
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


# SIGKILL, memory, serving, two processes --------------------------------------------------------


def training(bench: "Bench", folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SCRIPT), f"--data_dir={bench.data_dir}", "--weights=none"]
    command += ["--no_mlflow", f"--device={bench.device.type}", f"--epochs={bench.epochs}"]
    command += [f"--output_dir={folder / 'models'}", f"--checkpoint_dir={folder / 'checkpoints'}"]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen([*command, *flags], stdout=log, stderr=log)


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.wait(LONGEST_SECONDS):
        sys.exit((folder / "log.txt").read_text(encoding="utf-8", errors="replace"))


def killed(bench: "Bench", folder: Path) -> Path:
    """Compare a run that SIGKILL ended after its first epoch with one that was left alone."""
    whole, broken = folder / "whole", folder / "broken"
    for place in (whole, broken):
        place.mkdir()
    finish(training(bench, whole), whole)
    process = training(bench, broken)
    while process.poll() is None and not list(broken.glob("checkpoints/*/checkpoint-*.pt")):
        time.sleep(0.05)
    if hasattr(signal, "SIGKILL"):
        process.send_signal(signal.SIGKILL)
    process.wait()
    finish(training(bench, broken, "--resume", "auto"), broken)
    states = [read_state(p / "models", read_record(p / "models")) for p in (whole, broken)]
    differences = [
        (states[0][key].double() - states[1][key].double()).abs().max().item() for key in states[0]
    ]
    print(
        f"\nSIGKILL after the first of {bench.epochs} epochs, then --resume auto: "
        f"the weights differ by at most {max(differences):.3g}; "
        f"exit code of the killed run {process.returncode}"
    )
    return whole / "models"


def memory(bench: "Bench") -> None:
    """Give an update less memory than it needs."""
    if bench.device.type != "cuda":
        print("\nmemory that runs out: not tried, this is not a CUDA device")
        return
    size = max(bench.batch_sizes)
    losses = {}
    for name, fraction in (("enough", 1.0), ("too little", None)):
        loop = bench.loop(bench.config(batch_size=size))
        batch = Pictures(size, loop.run.config, len(bench.data.class_to_idx))
        torch.cuda.empty_cache()
        if fraction is None:
            total = torch.cuda.get_device_properties(bench.device).total_memory
            fraction = 0.6 * torch.cuda.max_memory_allocated(bench.device) / total
        torch.cuda.set_per_process_memory_fraction(fraction, bench.device)
        torch.cuda.reset_peak_memory_stats(bench.device)
        step = Ours(loop).update(batch)
        peak = torch.cuda.max_memory_allocated(bench.device) / 2**30
        losses[name] = float(step[0]) / size
        print(
            f"memory, {name}: {loop.run.micro_batch.size} of {size} images at a time, "
            f"{peak:.2f} GiB, loss {losses[name]:.6f}"
        )
        loop.close()
    torch.cuda.set_per_process_memory_fraction(1.0, bench.device)


def serving(bench: "Bench", models: Path) -> None:
    print(f"\nanswers/s of the network, version {list_versions(models)[-1]}")
    predictors = {"CPU": load_model_for_inference(models)}
    predictors[str(bench.device)] = load_model_for_inference(models, device=bench.device)
    crop = predictors["CPU"].record.preprocessing.crop
    for size in (1, 8):
        images = torch.randint(0, 256, (size, 3, crop, crop), dtype=torch.uint8)
        works = [
            lambda predictor=predictor, images=images: sum(
                len(predictor.predict_batch(images)) for _ in range(bench.repeats)
            )
            for predictor in predictors.values()
        ]
        result = alternating.compare(works[0], works[1], bench.rounds)
        alternating.report(f"photos at once: {size} (CPU; {bench.device})", "photos/s", result)


def two_processes(bench: "Bench", folder: Path) -> None:
    if bench.device.type == "cuda" and torch.cuda.device_count() < 2:
        print("\ntwo processes: not tried, there is one GPU")
        return
    log = folder / "two.txt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(SCRIPT), "--dry_run", f"--data_dir={bench.data_dir}", "--weights=none"]
    command += [f"--device={bench.device.type}"]
    with log.open("wb") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(
            command, stdout=file, stderr=file, env=environment, timeout=LONGEST_SECONDS, check=False
        ).returncode
    print(f"\ntwo processes, a whole run on a handful of images: exit code {code}")
    if code:
        sys.exit(log.read_text(encoding="utf-8", errors="replace"))


# ------------------------------------------------------------------------------------------------


class Bench:
    """What is measured, on which device, and how much of it."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.device, self.folder = torch.device(options.device), folder
        self.data_dir = options.data_dir or draw_sample(alternating.REPOSITORY / "data" / "sample")
        short = options.short
        self.model_names = list(BACKBONES)[:1] if short else list(BACKBONES)
        self.batch_sizes = [4] if short else [32, 128, 512]
        self.precisions = ["fp32"] if short else ["bf16", "fp16"]
        self.rounds, self.repeats = (1, 1) if short else (3, 5)
        self.epochs, self.updates = (2, 3) if short else (4, 50)
        self.data: FoodData = train_model.load_data(self.config())

    def config(self, **settings: Any) -> TrainingConfig:
        return TrainingConfig(
            data_dir=self.data_dir, weights="none", checkpoint_dir=self.folder, **settings
        )

    def loop(self, config: TrainingConfig) -> OurLoop:
        return OurLoop(config, self.data, self.folder / "loop", device=self.device)


def main() -> None:
    parser = alternating.make_parser(__doc__)
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=cuda, help=f"cuda, mps or cpu (here: {cuda})")
    parser.add_argument("--data_dir", type=Path, help="class folders (default: the drawn sample)")
    parser.add_argument("--short", action="store_true", help="one small case of everything")
    options = parser.parse_args()
    began = time.perf_counter()
    print(alternating.machine())
    if options.device == "cuda":
        print(json.dumps(torch.cuda.get_device_name()), f"CUDA {torch.version.cuda}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bench = Bench(options, folder)
        throughput(bench)
        waiting(bench)
        memory(bench)
        serving(bench, killed(bench, folder))
        two_processes(bench, folder)
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
