"""What goes on inside a net while images pass: the outputs of its stages, its first convolution, how far units see."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convlens.errors import UnknownNameError, UsageError


@contextlib.contextmanager
def recording(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Keep the outputs of modules, by name, of every pass inside the block; the last pass counts."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: object) -> object:
        if not isinstance(output, Tensor):
            return output
        outputs[name] = output
        return output.clone()  # what comes behind may work in place

    hooks = [m.register_forward_hook(lambda *all, name=name: keep(name, all[-1])) for name, m in modules.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def in_use(net: nn.Module) -> Iterator[None]:
    """Let the net compute as it does when it is used, not trained, inside the block."""
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)


def stages_of(net: nn.Module) -> dict[str, nn.Module]:
    """Return the named stages of a net that keeps the model contract."""
    return dict(net.stages())  # type: ignore[operator]


def get_stage(net: nn.Module, name: str) -> nn.Module:
    """Return a stage by name; UnknownNameError, which names those there are, if the net has no such stage."""
    stages = stages_of(net)
    if name not in stages:
        raise UnknownNameError("stage", name, list(stages))
    return stages[name]


@torch.no_grad()
def feature_maps(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the output of every stage that is an image, float (N, C', H', W'), of normalised images (N, C, H, W)."""
    with in_use(net), recording(stages_of(net)) as outputs:
        net(x)
    return {name: output for name, output in outputs.items() if output.dim() == 4}


def first_convolution(net: nn.Module) -> nn.Conv2d | None:
    """Return the convolution that sees the pixels themselves, the first that the net holds, if it has any."""
    return next((module for module in net.modules() if isinstance(module, nn.Conv2d)), None)


@dataclass(frozen=True)
class ReceptiveField:
    """One unit of a stage: its channel and its place on the map, and the pixels that it sees."""

    channel: int
    y: int
    x: int
    top: int  # rows top <= y < bottom and columns left <= x < right of the image
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of what it sees; its part outside the image is not counted."""
        return self.bottom - self.top, self.right - self.left


def receptive_field(
    net: nn.Module, stage: str, unit: tuple[int, int, int], shape: tuple[int, int, int]
) -> ReceptiveField:
    """Return what a unit (channel, y, x) of a stage sees of images (C, H, W).

    Found by differentiating the unit's place, in all channels at once, by random images: a pixel without a gradient in
    any of them is not seen. That holds for every net, where a formula over kernels and strides holds for plain chains.
    Raises UnknownNameError for a stage that the net has not, UsageError for a unit that the stage has not.
    """
    generator = torch.Generator().manual_seed(0)
    device = next(net.parameters()).device
    x = torch.randn(16, *shape, generator=generator).to(device).requires_grad_()
    with torch.enable_grad(), in_use(net), recording({stage: get_stage(net, stage)}) as outputs:
        net(x)
    maps = outputs.get(stage)
    if maps is None or maps.dim() != 4:
        raise UsageError(f"stage {stage} gives no maps: none of its units has a place in the image")
    channels, height, width = maps.shape[1:]
    channel, row, column = unit
    if not (0 <= channel < channels and 0 <= row < height and 0 <= column < width):
        raise UsageError(
            f"stage {stage} has no unit {channel},{row},{column}: it has {channels} maps of {height} rows and {width} "
            "columns, counted from 0"
        )
    weights = torch.randn(channels, generator=generator).to(device)  # so that no two channels cancel out
    (gradient,) = torch.autograd.grad((maps[:, :, row, column] * weights).sum(), x)
    seen = gradient.abs().sum(dim=(0, 1)) > 0  # (H, W)
    rows, columns = (seen.any(dim=axis).nonzero().squeeze(1).tolist() for axis in (1, 0))
    if not rows:
        return ReceptiveField(channel, row, column, 0, 0, 0, 0)
    return ReceptiveField(channel, row, column, rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)


def most_active_unit(maps: Tensor) -> tuple[int, int, int]:
    """Return channel, y and x of the largest value of maps (C', H', W')."""
    channels, height, width = maps.shape
    channel, place = divmod(int(maps.argmax()), height * width)
    return channel, *divmod(place, width)
