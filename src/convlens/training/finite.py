"""Sees when a training does not compute with numbers any more, and says so."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from convlens.errors import DivergenceError
from convlens.training.recipe import Recipe
from convlens.training.state import TrainState


class FiniteCheck:
    """Looks whether a training still computes with numbers: its loss, its gradients, BatchNorm's statistics."""

    def __init__(self, net: nn.Module, statistics: Mapping[str, Tensor]):
        # listed once: to walk through a net costs more than to look at its figures
        self._parameters = [(f"the gradient of {name}", p) for name, p in net.named_parameters() if p.requires_grad]
        self._statistics = {f"the buffer {name}": value for name, value in statistics.items()}

    def check(self, loss: Tensor, state: TrainState, recipe: Recipe) -> None:
        """Raise Diverged after a backward pass unless everything is a number."""
        gradients = {name: p.grad for name, p in self._parameters if p.grad is not None}
        values = {"the loss": loss, **gradients, **self._statistics}
        if has_nonfinite(list(values.values())):
            check_finite(values, state, recipe)


def has_nonfinite(values: list[Tensor]) -> bool:
    """Say whether one of ``values``, floats on one device, holds an infinity or NaN.

    One call of what loss scaling looks with, at a quarter of the cost of a look at each. It multiplies them, too: by 1,
    which changes no bit, but writes. So they must be nobody else's, as gradients and BatchNorm's statistics are.
    """
    found, scale = (torch.full((), value, dtype=torch.float32, device=values[0].device) for value in (0.0, 1.0))
    torch._amp_foreach_non_finite_check_and_unscale_(values, found, scale)
    return bool(found)


def check_finite(values: Mapping[str, Tensor], state: TrainState, recipe: Recipe) -> None:
    """Raise Diverged that names the first of ``values`` that is not made of numbers."""
    finite = {name: value.isfinite().all() for name, value in values.items()}
    if not bool(torch.stack(list(finite.values())).all()):  # an accelerator is asked once
        raise divergence_error(next(name for name, whole in finite.items() if not whole), state, recipe)


def divergence_error(what: str, state: TrainState, recipe: Recipe) -> DivergenceError:
    """Return the error that says what is not a number, and what to try."""
    return DivergenceError(
        f"{what} is not a number any more (at step {state.step}); try a lower --lr (now {recipe.lr:g}), "
        "a longer --warmup-fraction, or --max-grad-norm 1"
    )
