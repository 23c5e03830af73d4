"""Detect NaN and infinity in losses, gradients, BatchNorm statistics and weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from convlens.errors import DivergenceError
from convlens.training.recipe import Recipe


class FiniteCheck:
    """Check of the values of a step: its loss, its gradients and BatchNorm's running statistics.

    Args:
        model: The model in training.
        statistics: BatchNorm's running means and variances by name.
        recipe: Its learning rate is part of the advice in the error message.
        every: Number of steps between two checks, because a check makes an accelerator wait.
    """

    def __init__(self, model: nn.Module, statistics: Mapping[str, Tensor], recipe: Recipe, *, every: int = 1):
        # listed once: walking through the modules costs more than the check
        self._parameters = [(f"the gradient of {name}", p) for name, p in model.named_parameters() if p.requires_grad]
        self._statistics = {f"the buffer {name}": value for name, value in statistics.items()}
        self._recipe, self._every = recipe, every

    def check(self, loss: Tensor, step: int) -> None:
        """Raise DivergenceError after the backward pass of ``step`` if a value is NaN or infinite."""
        if step % self._every:
            return
        gradients = {name: p.grad for name, p in self._parameters if p.grad is not None}
        values = {"the loss": loss, **gradients, **self._statistics}
        if has_nonfinite(list(values.values())):
            check_finite(values, step, self._recipe)


def has_nonfinite(values: list[Tensor]) -> bool:
    """Return True if one of ``values``, float tensors on one device, holds a NaN or an infinity.

    This is one call of loss scaling's kernel, at a quarter of the cost of a check per tensor. The kernel also
    multiplies the values by 1, which changes no bit but writes: other threads must not use them.
    """
    found, scale = (torch.full((), value, dtype=torch.float32, device=values[0].device) for value in (0.0, 1.0))
    torch._amp_foreach_non_finite_check_and_unscale_(values, found, scale)
    return bool(found)


def check_finite(values: Mapping[str, Tensor], step: int, recipe: Recipe) -> None:
    """Raise DivergenceError that names the first of ``values`` with a NaN or an infinity."""
    finite = {name: value.isfinite().all() for name, value in values.items()}
    if not bool(torch.stack(list(finite.values())).all()):  # one transfer from an accelerator
        raise divergence_error(next(name for name, whole in finite.items() if not whole), step, recipe)


def divergence_error(what: str, step: int, recipe: Recipe) -> DivergenceError:
    """Return the error that says which value is not finite, and what to try."""
    return DivergenceError(
        f"{what} is NaN or infinite (at step {step}); try a lower `lr` (now {recipe.lr:g}), "
        "a longer `warmup_fraction`, or a `max_grad_norm` of 1"
    )
