"""Activations inside a model: the feature maps of its stages, and measured receptive fields."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convlens.errors import UnknownNameError, UsageError

RECEPTIVE_FIELD_IMAGES = 16  # random images; a pixel is seen if any of them has a gradient there


@contextlib.contextmanager
def record_outputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of modules, by name, inside the block; a later forward pass overwrites an earlier one."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: object) -> object:
        if not isinstance(output, Tensor):
            return output
        outputs[name] = output
        return output.clone()  # the next module may work in place

    hooks = [m.register_forward_hook(lambda *all, name=name: keep(name, all[-1])) for name, m in modules.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode inside the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def stages_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the stages of a model, by name."""
    return dict(model.stages())  # type: ignore[operator]


def get_stage(model: nn.Module, name: str) -> nn.Module:
    """Return a stage by name; raise UnknownNameError if the model has no such stage."""
    stages = stages_of(model)
    if name not in stages:
        raise UnknownNameError("stage", name, list(stages))
    return stages[name]


@torch.no_grad()
def feature_maps(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the feature maps of every stage with a spatial output.

    Args:
        model: A model with named stages.
        x: Normalized images, float (N, C, H, W).

    Returns:
        Stage name -> feature maps, float (N, C', H', W').
    """
    with eval_mode(model), record_outputs(stages_of(model)) as outputs:
        model(x)
    return {name: output for name, output in outputs.items() if output.dim() == 4}


def first_convolution(model: nn.Module) -> nn.Conv2d | None:
    """Return the first convolution of a model, which sees the pixels; None if the model has no convolution."""
    return next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)


@dataclass(frozen=True)
class ReceptiveField:
    """The receptive field of one unit: rows ``top <= y < bottom`` and columns ``left <= x < right`` of the image."""

    channel: int
    y: int  # position of the unit on its feature map
    x: int
    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the part inside the image."""
        return self.bottom - self.top, self.right - self.left


def receptive_field(
    model: nn.Module, stage: str, unit: tuple[int, int, int], shape: tuple[int, int, int]
) -> ReceptiveField:
    """Measure the receptive field of a unit.

    A pixel belongs to it if the unit's position, in all channels, has a gradient with respect to the pixel for any of
    16 random images. That works for every model; a formula over kernels and strides works only for plain chains.

    Args:
        model: A model with named stages.
        stage: The name of a stage.
        unit: Channel, y and x of the unit.
        shape: Shape of the images, (C, H, W).

    Raises:
        UnknownNameError: If the model has no such stage.
        UsageError: If the stage has no such unit.
    """
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    x = torch.randn(RECEPTIVE_FIELD_IMAGES, *shape, generator=generator).to(device).requires_grad_()
    with torch.enable_grad(), eval_mode(model), record_outputs({stage: get_stage(model, stage)}) as outputs:
        model(x)
    maps = outputs.get(stage)
    if maps is None or maps.dim() != 4:
        raise UsageError(f"stage {stage} has no feature maps: its units have no position in the image")
    channels, height, width = maps.shape[1:]
    channel, row, column = unit
    if not (0 <= channel < channels and 0 <= row < height and 0 <= column < width):
        raise UsageError(
            f"stage {stage} has no unit {channel},{row},{column}: it has {channels} maps of {height} rows and {width} "
            "columns, counted from 0"
        )
    weights = torch.randn(channels, generator=generator).to(device)  # random, so that channels cannot cancel out
    (gradient,) = torch.autograd.grad((maps[:, :, row, column] * weights).sum(), x)
    seen = gradient.abs().sum(dim=(0, 1)) > 0  # (H, W)
    rows, columns = (seen.any(dim=axis).nonzero().squeeze(1).tolist() for axis in (1, 0))
    if not rows:
        return ReceptiveField(channel, row, column, 0, 0, 0, 0)
    return ReceptiveField(channel, row, column, rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)


def most_active_unit(maps: Tensor) -> tuple[int, int, int]:
    """Return channel, y and x of the largest value of feature maps (C', H', W')."""
    channels, height, width = maps.shape
    channel, position = divmod(int(maps.argmax()), height * width)
    return channel, *divmod(position, width)
