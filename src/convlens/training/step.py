"""The training step: forward, loss, backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from convlens.training.precision import autocast

if TYPE_CHECKING:
    from convlens.training.build import TrainSetup


def forward_backward(setup: TrainSetup, images: Tensor, labels: Tensor, fraction: float = 1.0) -> tuple[Tensor, Tensor]:
    """Add the gradients of a batch to those of the parameters.

    Args:
        setup: Model, loss and precision.
        images: Normalized float images (N, C, H, W).
        labels: Labels (N,) or probabilities (N, K).
        fraction: Weight of the loss: the fraction of the whole batch that these images are.

    Returns:
        The mean loss, a scalar, and the logits (N, K), both detached.
    """
    with autocast(setup.precision, setup.device), setup.batchnorm:
        logits = setup.model(images)
    loss = setup.compute_loss(logits.float(), labels)
    # not backward(fraction): to check the shape of its argument PyTorch imports SymPy, which takes 0.3 s
    (loss * fraction).backward()  # type: ignore[no-untyped-call]
    return loss.detach(), logits.detach()
