"""The optimizers SGD, Adam, AdamW and Muon, each as one fused update of a group of weights.

The first three compute the same numbers as torch.optim. But the first step of torch.optim imports PyTorch's compiler,
which takes 1.6 s, longer than a small model trains. torch.optim.Muon takes matrices only, not filters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # K. Jordan's quintic (2024), steep at 0: three steps suffice


class ParamGroup(ABC):
    """Weights with one update rule; ``slots`` holds the rule's state, one tensor per weight, by name."""

    def __init__(self, weights: Sequence[Tensor], lr_scale: float = 1.0, slots: Sequence[str] = ()):
        self.weights: list[Tensor] = list(weights)
        self.lr_scale = lr_scale
        self.slots = {name: [torch.zeros_like(w, requires_grad=False) for w in weights] for name in slots}

    @abstractmethod
    def update(self, lr: float) -> None:
        """Change the weights in place from their gradients."""

    def gradients(self) -> list[Tensor]:
        """Return the gradients with the strides of their weights, which the fused kernels require.

        A weight that the loss does not depend on has the gradient 0.
        """
        return [
            torch.zeros_like(w) if w.grad is None
            else w.grad if w.grad.stride() == w.stride()
            else torch.empty_like(w).copy_(w.grad)
            for w in self.weights
        ]  # fmt: skip


class SGD(ParamGroup):
    """Gradient descent with momentum, optionally Nesterov's, and weight decay added to the gradient."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        lr_scale: float = 1.0,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ):
        super().__init__(weights, lr_scale, ("momentum",) if momentum else ())
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay

    def update(self, lr: float) -> None:
        """Take one step."""
        torch._fused_sgd_(
            self.weights,
            self.gradients(),
            self.slots.get("momentum", []),
            lr=lr,
            momentum=self.momentum,
            dampening=0.0,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            maximize=False,
            is_first_step=False,
        )


class Adam(ParamGroup):
    """Adam (Kingma, Ba 2015), or AdamW (Loshchilov, Hutter 2019) with decoupled weight decay."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        lr_scale: float = 1.0,
        betas: tuple[float, float],
        decoupled: bool,
        weight_decay: float = 0.0,
    ):
        super().__init__(weights, lr_scale, ("mean", "square"))
        self.betas, self.weight_decay = betas, weight_decay
        self.fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
        self.slots["count"] = [torch.zeros((), device=w.device) for w in weights]

    def update(self, lr: float) -> None:
        """Take one step."""
        torch._foreach_add_(self.slots["count"], 1)
        self.fused(
            self.weights,
            self.gradients(),
            self.slots["mean"],
            self.slots["square"],
            [],
            self.slots["count"],
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=self.weight_decay,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )


class Muon(ParamGroup):
    """Muon (K. Jordan et al. 2024) for convolutions: steps along the momentum with all its singular values set to 1.

    A filter bank (C', C, k, k) is treated as the matrix (C', C k k). Before each step it is scaled to the norm
    sqrt(C'), instead of weight decay.
    """

    def __init__(self, weights: Sequence[Tensor], *, lr_scale: float = 1.0, momentum: float):
        super().__init__(weights, lr_scale, ("momentum",))
        self.momentum = momentum

    def update(self, lr: float) -> None:
        """Take one step."""
        for weight, gradient, buffer in zip(self.weights, self.gradients(), self.slots["momentum"], strict=True):
            buffer.mul_(self.momentum).add_(gradient)
            direction = zeropower_via_newtonschulz(gradient.add(buffer, alpha=self.momentum).flatten(1))
            weight.mul_(len(weight) ** 0.5 / weight.norm())
            weight.add_(direction.view_as(weight), alpha=-lr)


def zeropower_via_newtonschulz(matrix: Tensor, steps: int = 3) -> Tensor:
    """Return the matrix (M, N) with its singular values near 1, by ``steps`` of a Newton-Schulz iteration.

    A step multiplies by a polynomial of the matrix times its transpose. These polynomials commute, so they are
    multiplied first, as small squares, and the matrix once: about half the arithmetic if it is wide.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    gram = wide @ wide.T

    def polynomial(gram: Tensor) -> Tensor:
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        return factor

    product = factor = polynomial(gram)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = polynomial(gram)
        product = factor @ product
    wide = torch.mm(product, wide)
    return wide if wide.shape == matrix.shape else wide.T


class Optimizer:
    """Groups of weights, each with its own update rule."""

    def __init__(self, groups: Sequence[ParamGroup]):
        self.groups = [group for group in groups if group.weights]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update all weights from their gradients, with the learning rate ``lr`` times the group's ``lr_scale``."""
        for group in self.groups:
            group.update(lr * group.lr_scale)

    def zero_grad(self) -> None:
        """Delete the gradients."""
        for group in self.groups:
            for weight in group.weights:
                weight.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the state of all update rules, by name."""
        return {
            f"{number}.{slot}.{index}": value
            for number, group in enumerate(self.groups)
            for slot, values in group.slots.items()
            for index, value in enumerate(values)
        }

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state that :meth:`tensors` returned; ValueError if it is of another optimizer."""
        own = self.tensors()
        if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
            raise ValueError("it was written by another optimizer, or by another version of convlens")
        for name, value in own.items():
            value.copy_(tensors[name])
