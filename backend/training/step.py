"""One update of the weights from one batch, whatever memory there is and however many processes."""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from app.ml.model import dropout_mask
from training.compute.distributed import Processes
from training.compute.features import FeatureBatch
from training.errors import TrainingError
from training.run.state import Run, is_out_of_memory


def train_step(
    run: Run,
    step_module: nn.Module,
    batch: FeatureBatch,
    processes: Processes,
) -> tuple[float, int]:
    """One update from one batch; returns the summed loss and the correct answers of our share."""
    total = processes.sum(len(batch.labels))[0]
    if not total:
        return 0.0, 0
    buffers = [buffer.clone() for buffer in run.trained.buffers()]
    while True:
        run.optimizer.zero_grad(set_to_none=True)
        try:
            loss_sum, correct = add_gradients(run, step_module, batch, processes, total)
            break
        except RuntimeError as error:
            if processes.world_size > 1 and is_out_of_memory(error):
                raise TrainingError(
                    f"memory ran out; lower --batch_size (now {run.config.batch_size})"
                ) from error
            run.micro_batch.halve(error)
        for buffer, before in zip(run.trained.buffers(), buffers, strict=True):
            buffer.copy_(before)  # batch-norm has seen images that will come again
    run.scaler.unscale_(run.optimizer)
    length = nn.utils.clip_grad_norm_(run.trained.parameters(), run.config.gradient_clip_max_norm)
    # In fp16 some gradients are not finite: the scaler passes those steps over by itself.
    if not (run.scaler.is_enabled() or math.isfinite(length)):
        loss_sum = math.nan
    if math.isfinite(loss_sum):
        with warmed_up_rate(run):
            run.scaler.step(run.optimizer)
        run.scaler.update()
        run.average.update()
    return loss_sum, correct


def add_gradients(
    run: Run,
    step_module: nn.Module,
    batch: FeatureBatch,
    processes: Processes,
    total: float,
) -> tuple[float, int]:
    """The gradients of the mean loss over the `total` images of all processes' shares, one
    micro-batch after the other; returns what `train_step` does."""
    device = batch.features.device
    labels, masks = batch.labels.to(device), _dropout_masks(run, batch).to(device)
    loss_sum, correct = 0.0, 0
    parts = run.micro_batch.parts(len(labels))
    # Each process computes as often as the others, which wait for it in every batch-norm.
    empty = slice(len(labels), len(labels))
    parts += [empty] * (int(processes.highest(len(parts))) - len(parts))
    for part in parts:
        with autocast(batch.features):
            logits = step_module(batch.features[part], masks[part])
        loss = nn.functional.cross_entropy(
            logits.float(),
            labels[part],
            reduction="sum",
            label_smoothing=run.config.label_smoothing,
        )
        # DDP averages over the processes; the mean is meant to be over the images of all of them.
        run.scaler.scale(loss * (processes.world_size / total)).backward()
        loss_sum += loss.item()
        correct += int((logits.argmax(dim=1) == labels[part]).sum())
    return loss_sum, correct


@contextlib.contextmanager
def warmed_up_rate(run: Run) -> Iterator[None]:
    """Inside, the rates are what they have grown to; they reach their values with the warm-up."""
    grown = min(1.0, (run.average.updates + 1) / max(run.warmup_steps, 1))
    rates = [group["lr"] for group in run.optimizer.param_groups]
    for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * grown
    yield
    for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _dropout_masks(run: Run, batch: FeatureBatch) -> Tensor:
    """This batch's masks, drawn for the whole batch from (seed, epoch, batch): (N, features)."""
    key = np.random.SeedSequence((run.config.seed, run.progress.epoch, run.progress.batch))
    generator = torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))
    features = run.trained.linear.in_features
    return dropout_mask(run.config.batch_size, features, generator)[batch.rows]


def autocast(features: Tensor) -> torch.autocast:
    """The arithmetic that the features came in; nothing changes for fp32."""
    is_low = features.dtype != torch.float32
    dtype = features.dtype if is_low else torch.bfloat16  # fp32 would be refused, though unused
    return torch.autocast(features.device.type, dtype, enabled=is_low)
