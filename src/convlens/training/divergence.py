"""Sees when a training does not compute with numbers any more, and says so."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from convlens.errors import Diverged
from convlens.training.checkpoint import TrainState
from convlens.training.recipe import Recipe


class NumberWatch:
    """Looks whether a training still computes with numbers: its loss, its gradients, BatchNorm's statistics."""

    def __init__(self, net: nn.Module):
        # listed once: to walk through a net costs more than to look at its figures
        self._parameters = [(f"the gradient of {name}", p) for name, p in net.named_parameters() if p.requires_grad]
        self._buffers = {f"the buffer {name}": b for name, b in net.named_buffers() if b.is_floating_point()}

    def check(self, loss: Tensor, state: TrainState, recipe: Recipe) -> None:
        """Raise Diverged after a backward pass unless everything is a number."""
        gradients = {name: p.grad for name, p in self._parameters if p.grad is not None}
        require_numbers({"the loss": loss, **gradients, **self._buffers}, state, recipe)


def require_numbers(values: Mapping[str, Tensor], state: TrainState, recipe: Recipe) -> None:
    """Raise Diverged that names the first of ``values`` that is not made of numbers."""
    norms = torch._foreach_norm([value for value in values.values() if value.numel()])
    if not bool(torch.stack(norms).isfinite().all()):  # one of them is no number, or its square is none
        for name, value in values.items():
            if not bool(value.isfinite().all()):
                raise diverged(name, state, recipe)


def diverged(what: str, state: TrainState, recipe: Recipe) -> Diverged:
    """Return the error that says what is not a number, and what to try."""
    return Diverged(
        f"{what} is not a number any more (at step {state.step}); try a lower --lr (now {recipe.lr:g}), "
        "a longer --warmup, or --clip-norm 1"
    )
