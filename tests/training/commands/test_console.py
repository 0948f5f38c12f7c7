"""What a person sees while a run trains."""

from types import SimpleNamespace
from typing import Any

import pytest

from training.commands import console
from training.commands.console import ProgressBar
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
