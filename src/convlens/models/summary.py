"""The summary table of a net: output shape, parameters, FLOPs and receptive field of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerSummary:
    """One layer as an image passes it.

    ``flops`` are those of convolutions and linear layers; what else there is costs little beside them.
    """

    name: str  # as in net.named_modules(): "body.conv1.0"
    kind: str  # its class: "Conv2d"
    output_shape: tuple[int, ...]  # without the batch dimension
    parameters: int
    flops: int  # forward, one image; a multiply-add counts as two
    receptive_field: int | None  # side in input pixels of what one output sees; None: the whole image


def summarize(net: nn.Module, channels: int, height: int, width: int) -> list[LayerSummary]:
    """Return every leaf layer of ``net`` in the order in which one (channels, height, width) image passes it.

    The receptive field is that of a chain of layers (Araujo, Norris, Sim 2019): it grows by (kernel - 1) times
    the product of all strides before. For nets that are no chain ``convlens.explain.activations.receptive_field``
    measures it. Raises what the net raises for images of another size than it was built for.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3))
    >>> [(layer.kind, layer.output_shape, layer.receptive_field) for layer in summarise(net, 1, 12, 12)]
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

    leaves = [(name, module) for name, module in net.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(hook(name)) for name, module in leaves]
    training = net.training
    try:
        with torch.no_grad():
            device = next(net.parameters()).device
            net.eval()(torch.zeros(1, channels, height, width, device=device))
    finally:
        net.train(training)
        for handle in hooks:
            handle.remove()
    return rows


def count_parameters(net: nn.Module) -> int:
    """Return the number of trainable and frozen parameters; buffers do not count.

    >>> count_parameters(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in net.parameters())
