"""What a person sees while a run trains."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training.commands import console
from training.commands.console import ProgressBar, log_epoch
from training.compute.distributed import Processes


def test_the_bar_counts_images_and_not_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 images in batches of 32 were once shown as 64, and the rate with them."""
    bars: list[Any] = []
    real = console.tqdm

    def shown(**options: Any) -> Any:
        bars.append(real(**{**options, "disable": False, "leave": True}))
        return bars[-1]

    monkeypatch.setattr(console, "tqdm", shown)
    progress = SimpleNamespace(epoch=0)
    run: Any = SimpleNamespace(progress=progress, config=SimpleNamespace(batch_size=32, epochs=2))
    source: Any = SimpleNamespace(order=SimpleNamespace(num_images=50))
    with ProgressBar(run, "train", source, Processes(), start=1) as bar:
        bar.update(18)
    with ProgressBar(run, "train", source, Processes(), start=2):
        pass
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [(32, 50, 50), (50, 50, 50)]


@pytest.mark.parametrize(
    ("device", "num_workers", "cache_images", "told"),
    [
        ("meta", 4, "on", "raise --num_workers (now 4)"),
        ("meta", 0, "off", "raise --num_workers (now 0) or set --cache_images on"),
        ("cpu", 1, "on", "raise --num_workers (now 1)"),
        ("cpu", 0, "off", "set --cache_images on"),
        ("cpu", 0, "on", None),
    ],
)
def test_slow_reading_is_told_with_what_would_help(
    device: str,
    num_workers: int,
    cache_images: str,
    told: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On a CPU, where threads read, reading takes a share of each epoch that no worker shortens."""
    caplog.set_level("INFO")
    config = SimpleNamespace(epochs=9, num_workers=num_workers, cache_images=cache_images)
    linear = torch.nn.Linear(1, 1, device=device)
    run: Any = SimpleNamespace(
        config=config,
        trained=SimpleNamespace(linear=linear),
        early_stopping=SimpleNamespace(should_stop=False),
    )
    names = ["train_loss", "train_acc", "val_loss", "val_acc", "learning_rate", "images_per_second"]
    metrics = dict.fromkeys(names, 0.5)
    for epoch, share in [(1, 0.5), (2, 0.1), (3, 0.11)]:
        log_epoch({**metrics, "epoch": epoch, "data_wait_share": share}, run, is_best=False)
    advice = [line for line in caplog.messages if not line.startswith("epoch")]
    assert advice == [f"the loader is the bottleneck; {told}"] * bool(told)
