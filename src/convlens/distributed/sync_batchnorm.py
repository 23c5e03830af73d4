"""BatchNorm across ranks, and the running statistics of BatchNorm."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convlens.distributed.process_group import distributed, translate_peer_failure
from convlens.errors import UsageError

RUNNING = ("running_mean", "running_var")  # BatchNorm's buffers


def batchnorm_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running means and variances of a model's BatchNorm layers, by buffer name."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
    statistics = {f"{name}.{kind}": getattr(layer, kind) for name, layer in layers.items() for kind in RUNNING}
    return {name: value for name, value in statistics.items() if value is not None}


class SyncBatchNorm:
    """Context in which a model's BatchNorm uses the statistics of the images of all ranks, forward and backward.

    PyTorch's own SyncBatchNorm works on accelerators only.

    Raises:
        UsageError: If a layer overrides BatchNorm's forward.
    """

    def __init__(self, model: nn.Module):
        self._layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
        for layer in self._layers:
            if type(layer).forward is not _BatchNorm.forward:  # some of timm's contain the activation too
                raise UsageError(f"`sync_batchnorm` does not support {type(layer).__name__}")

    def __enter__(self) -> None:
        for layer in self._layers:
            layer.forward = functools.partial(normalize_across_ranks, layer)  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            del layer.forward


def normalize_across_ranks(layer: _BatchNorm, x: Tensor) -> Tensor:
    """Apply BatchNorm to ``x`` (N, C, ...) with the mean and variance over the images of all ranks."""
    if not layer.training:
        return type(layer).forward(layer, x)
    values = x.float()
    places = [d for d in range(x.dim()) if d != 1]
    ours = values.numel() // values.shape[1]  # values per channel
    mean, count = all_reduce_sum(values.sum(places, keepdim=True), ours)  # (1, C, 1, 1)
    mean = mean / count
    variance = all_reduce_sum((values - mean).square().sum(places, keepdim=True), ours)[0] / count
    if layer.running_mean is not None and layer.running_var is not None and layer.num_batches_tracked is not None:
        with torch.no_grad():
            layer.num_batches_tracked += 1
            step = 1 / layer.num_batches_tracked.item() if layer.momentum is None else layer.momentum
            layer.running_mean.lerp_(mean.flatten(), step)
            layer.running_var.lerp_((variance * count / (count - 1)).flatten(), step)
    out = (values - mean) * (variance + layer.eps).rsqrt()
    if layer.affine:
        out = out * layer.weight.view_as(mean) + layer.bias.view_as(mean)
    return out.to(x.dtype)


def all_reduce_sum(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the sums over all ranks of ``x``, with gradients, and of ``count``, the number of values in ``x``."""
    total, values = AllReduceSum.apply(x, count)  # type: ignore[no-untyped-call]
    return total, values


class AllReduceSum(torch.autograd.Function):
    """Autograd function of :func:`all_reduce_sum`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return both sums."""
        ctx.count = count
        total = torch.cat([x.flatten(), x.new_full((1,), count)])
        with translate_peer_failure():
            distributed().all_reduce(total)
        return total[:-1].view_as(x), total[-1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        """Sum the gradients of all ranks, weighted by their images, as World.all_reduce_mean weighs them later."""
        total = gradient.contiguous() * ctx.count
        with translate_peer_failure():
            distributed().all_reduce(total)
        return total / ctx.count, None
