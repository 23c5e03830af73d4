"""Exponential moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average of all floating-point weights and buffers; with decay 0 it does nothing."""

    def __init__(self, net: nn.Module, decay: float):
        self._net, self._decay = net, decay
        self.weights = {k: v.detach().clone() for k, v in self._live().items()} if decay else {}

    def _live(self) -> dict[str, Tensor]:
        return {k: v for k, v in self._net.state_dict().items() if v.is_floating_point()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the net's weights after ``step`` steps; early on it follows them faster."""
        if not self._decay:
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        live = self._live()
        keys = list(self.weights)
        torch._foreach_lerp_([self.weights[k] for k in keys], [live[k] for k in keys], 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the net use the averaged weights inside the block."""
        if not self._decay:
            yield
            return
        own = {k: v.clone() for k, v in self._live().items()}
        self._net.load_state_dict(self.weights, strict=False)
        try:
            yield
        finally:
            self._net.load_state_dict(own, strict=False)
