"""What BatchNorm remembers of the images it saw, and how it measures those of several processes at once."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convlens.distributed.process_group import distributed, translate_peer_failure
from convlens.errors import UsageError

RUNNING = ("running_mean", "running_var")  # BatchNorm's buffers


def batchnorm_statistics(net: nn.Module) -> dict[str, Tensor]:
    """Return the running means and variances of a net's BatchNorm by name."""
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, _BatchNorm)}
    statistics = {f"{name}.{kind}": getattr(layer, kind) for name, layer in layers.items() for kind in RUNNING}
    return {name: value for name, value in statistics.items() if value is not None}


class SyncBatchNorm:
    """``with``: the BatchNorm of a net measures the images of all ranks at once, forwards and backwards.

    PyTorch's own SyncBatchNorm does so on accelerators only.
    """

    def __init__(self, net: nn.Module):
        self._layers = [layer for layer in net.modules() if isinstance(layer, _BatchNorm)]
        for layer in self._layers:
            if type(layer).forward is not _BatchNorm.forward:  # timm's, some of which hold what follows as well
                raise UsageError(f"--sync-batchnorm cannot measure {type(layer).__name__}, a BatchNorm of its own kind")

    def __enter__(self) -> None:
        for layer in self._layers:
            layer.forward = functools.partial(normalize_across_ranks, layer)  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            del layer.forward


def normalize_across_ranks(layer: _BatchNorm, x: Tensor) -> Tensor:
    """Do what BatchNorm does to ``x`` (N, C, ...), with the mean and variance over the images of all ranks."""
    if not layer.training:
        return type(layer).forward(layer, x)
    values = x.float()
    places = [d for d in range(x.dim()) if d != 1]
    ours = values.numel() // values.shape[1]  # values of a channel
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
    """Return the sum over all ranks of ``x``, with gradients, and that of ``count``, the values that went into it."""
    total, values = AllReduceSum.apply(x, count)  # type: ignore[no-untyped-call]
    return total, values


class AllReduceSum(torch.autograd.Function):
    """What :func:`all_reduce_sum` does."""

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
        """Add up the gradients of all losses, as Ranks.average will weigh them: by the number of images."""
        total = gradient.contiguous() * ctx.count
        with translate_peer_failure():
            distributed().all_reduce(total)
        return total / ctx.count, None
