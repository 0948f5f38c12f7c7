"""Continuing in smaller parts when memory runs out."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from training.errors import TrainingError

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@dataclass
class MicroBatch:
    """How many images go through the network at once: half as many each time memory runs out.

    is_fixed: the size must not change, as other processes count on it.
    """

    size: int
    is_fixed: bool = False

    def parts(self, num_images: int) -> list[slice]:
        """Return at least one part, which is empty where there are no images."""
        return [slice(i, i + self.size) for i in range(0, max(num_images, 1), self.size)]

    def equal_parts(self, num_images: int, whole: int, world_size: int) -> list[slice]:
        """Split a share into as many parts as in every other process, as each waits for the rest.

        whole: images of the whole batch, over all processes.
        """
        if world_size == 1:
            return self.parts(num_images)
        parts, empty = self.parts(num_images), slice(num_images, num_images)
        return parts + [empty] * (len(self.parts(-(-whole // world_size))) - len(parts))

    def attempt(self, compute: Callable[[], Result]) -> Result:
        """Return compute(), called again with a smaller size each time memory runs out."""
        while True:
            try:
                return compute()
            except (MemoryError, RuntimeError) as error:
                self.halve(error)

    def map(self, compute: Callable[[slice], Tensor], num_images: int) -> Tensor:
        """Concatenate compute(part) over all parts: (num_images, ...)."""

        def whole() -> Tensor:
            results = [compute(part) for part in self.parts(num_images)]
            return results[0] if len(results) == 1 else torch.cat(results)

        return self.attempt(whole)

    def halve(self, error: MemoryError | RuntimeError) -> None:
        """Make the parts smaller after an error that says that memory ran out; raise any other.

        Raises:
            TrainingError: the parts cannot be smaller.
        """
        if not is_out_of_memory(error):
            raise error
        if self.is_fixed:
            raise TrainingError("memory ran out; lower --batch_size") from error
        if self.size == 1:
            raise TrainingError(
                "there is not enough memory for a single image; close other programs, freeze more "
                "layers (--freeze_layers) or choose a smaller --model_name"
            ) from error
        self.size = -(-self.size // 2)
        logger.warning(
            "memory ran out: now at most %d images at a time; a step still uses a whole batch",
            self.size,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Python and a GPU's allocator have their own error; the CPU's is told by its message only."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "DefaultCPUAllocator" in str(error)
