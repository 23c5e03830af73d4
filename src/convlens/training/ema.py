"""Exponential moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average of all floating-point weights and buffers; with decay 0 a no-op."""

    def __init__(self, model: nn.Module, decay: float):
        self._model, self._decay = model, decay
        self.weights = {k: v.detach().clone() for k, v in self._live().items()} if decay else {}

    def _live(self) -> dict[str, Tensor]:
        return {k: v for k, v in self._model.state_dict().items() if v.is_floating_point()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after ``step`` steps; the decay rises from 0.1 over the first steps."""
        if not self._decay:
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        live = self._live()
        keys = list(self.weights)
        torch._foreach_lerp_([self.weights[k] for k in keys], [live[k] for k in keys], 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the averaged weights inside the block, and its own back afterwards."""
        if not self._decay:
            yield
            return
        own = {k: v.clone() for k, v in self._live().items()}
        self._model.load_state_dict(self.weights, strict=False)
        try:
            yield
        finally:
            self._model.load_state_dict(own, strict=False)
