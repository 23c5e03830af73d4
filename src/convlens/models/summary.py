"""Output shape, parameters, FLOPs and receptive field of every layer of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerSummary:
    """One layer of a model.

    Args:
        name: As in ``model.named_modules()``, such as "body.conv1.0".
        kind: The class, such as "Conv2d".
        output_shape: Without the batch dimension.
        parameters: Their number.
        flops: Of the forward pass of one image, for convolutions and linear layers; other layers count 0. A
            multiply-add counts as two.
        receptive_field: Its side in input pixels; None for the whole image.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    flops: int
    receptive_field: int | None


def summarize(model: nn.Module, channels: int, height: int, width: int) -> list[LayerSummary]:
    """Return the leaf layers of ``model`` in forward order.

    The receptive field is that of a chain of layers (Araujo et al. 2019): it grows by (kernel - 1) times the product of
    all strides before. ``convlens.explain.activations.receptive_field`` measures it for other models.

    Args:
        model: Must accept the images.
        channels: The number of image channels.
        height: In pixels.
        width: In pixels.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3))
    >>> [(layer.kind, layer.output_shape, layer.receptive_field) for layer in summarize(model, 1, 12, 12)]
    [('Conv2d', (4, 10, 10), 3), ('MaxPool2d', (4, 5, 5), 4), ('Conv2d', (8, 3, 3), 8)]
    """
    rows: list[LayerSummary] = []
    field, jump = 1, 1
    whole = False

    def record(name: str, module: nn.Module, output: Tensor) -> None:
        nonlocal field, jump, whole
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            sizes = (module.kernel_size, module.stride, getattr(module, "dilation", 1))
            kernel, stride, dilation = (v[0] if isinstance(v, tuple) else v for v in sizes)
            field += int(dilation) * (int(kernel) - 1) * jump
            jump *= int(stride)
        elif isinstance(module, (nn.Linear, nn.Flatten, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)):
            whole = True
        flops = 0
        if isinstance(module, nn.Conv2d):
            flops = 2 * output[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            flops = 2 * module.weight.numel()
        parameters = sum(p.numel() for p in module.parameters())
        shape = tuple(output.shape[1:])
        kind = type(module).__name__
        rows.append(LayerSummary(name, kind, shape, parameters, flops, None if whole else field))

    def hook(name: str) -> Any:
        return lambda module, _inputs, output: record(name, module, output)

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(hook(name)) for name, module in leaves]
    training = model.training
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            model.eval()(torch.zeros(1, channels, height, width, device=device))
    finally:
        model.train(training)
        for handle in hooks:
            handle.remove()
    return rows


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, trainable and frozen; buffers do not count.

    >>> count_parameters(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in model.parameters())
