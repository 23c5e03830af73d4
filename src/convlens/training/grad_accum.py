"""Gradient accumulation: forward and backward in micro-batches, smaller ones when memory runs out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convlens.system.memory import is_out_of_memory, release_memory, retain_freed_memory
from convlens.training.state import TrainState
from convlens.training.step import forward_backward

if TYPE_CHECKING:
    from convlens.training.build import TrainSetup

logger = logging.getLogger("convlens")


class GradientAccumulator:
    """Forward, loss and backward of a batch, in ``state.grad_accum_steps`` micro-batches whose gradients add up.

    When memory runs out, the batch is tried again in twice as many micro-batches, and later batches keep that number.
    The effective batch size stays the same, but BatchNorm normalizes each micro-batch by itself. A failed attempt has
    changed BatchNorm's running statistics and the random state of dropout.

    On a CPU, freed memory is retained for the next step once a step has fitted; see :mod:`convlens.system.memory`.
    """

    def __init__(self, setup: TrainSetup, state: TrainState):
        self._setup, self._state = setup, state
        self._may_retain = setup.device.type == "cpu"

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of a batch.

        Args:
            images: Normalized float images (N, C, H, W).
            labels: Labels (N,) or probabilities (N, K).

        Returns:
            The mean loss, a scalar, and the logits (N, K), both detached.

        Raises:
            RuntimeError, MemoryError: If there is not enough memory for two images at a time, or if the ranks
                synchronize within a step, so that one rank cannot try again.
        """
        result = self._attempt(images, labels)
        while result is None:  # outside of the except block: the exception would keep what filled the memory
            self._state.grad_accum_steps *= 2
            self._setup.optimizer.zero_grad()
            if images.device.type == "cpu":
                release_memory()
            result = self._attempt(images, labels)
            if result is not None:
                logger.warning(
                    "not enough memory for %d images at once; from here on each step accumulates the gradients of %d "
                    "micro-batches",
                    len(images),
                    self._state.grad_accum_steps,
                )
        if self._may_retain and self._state.grad_accum_steps == self._setup.recipe.grad_accum_steps:
            retain_freed_memory()
            self._may_retain = False
        return result

    def _attempt(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return loss and logits, or None if there was not enough memory and smaller micro-batches may help."""
        self._setup.optimizer.zero_grad()
        # a micro-batch has two images at least: BatchNorm cannot learn from one
        count = max(min(self._state.grad_accum_steps, len(images) // 2), 1)
        losses, logits = [], []
        try:
            if count == 1:
                return forward_backward(self._setup, images, labels)
            for x, y in zip(images.tensor_split(count), labels.tensor_split(count), strict=True):
                fraction = len(x) / len(images)
                loss, output = forward_backward(self._setup, x, y, fraction)
                losses.append(loss * fraction)
                logits.append(output)
        except (RuntimeError, MemoryError) as error:
            too_small = len(images) // (2 * self._state.grad_accum_steps) < 2
            if self._setup.sync_batchnorm or not is_out_of_memory(error) or too_small:
                raise
            return None
        return torch.stack(losses).sum(), torch.cat(logits)
