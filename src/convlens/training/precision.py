"""Precision of training: fp32, or bf16 if this machine computes the model's convolutions faster and correctly in it."""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from convlens.data.resize import resized_shape
from convlens.errors import ConvlensError
from convlens.system.files import cache_dir, read_json, write_json
from convlens.system.hardware import has_bf16, processor_name
from convlens.training.recipe import Recipe
from convlens.training.schedule import require_any_size

PROBE_IMAGES, PROBE_ROUNDS = 64, 4
TOLERANCE = 0.02  # of the largest value; bf16 itself keeps about 3 digits
MAX_TIME_FRACTION = 0.9  # of fp32's time, for bf16 to be chosen

Convolution = tuple[nn.Conv2d, tuple[int, ...]]  # a layer, and the shape (C, H, W) of its input


def choose_precision(recipe: Recipe, device: torch.device, model: nn.Module, shape: tuple[int, int, int]) -> str:
    """Return "fp32" or "bf16" for a training.

    ``auto`` on a CPU times every convolution of the model, forward and backward, in both. bf16 is chosen if all results
    are correct and the sum of the times is shorter: some shapes miss the fast path, and some have come out wrong. The
    results are cached by processor, PyTorch version and shape.

    Args:
        recipe: How to train; its ``precision`` may be fixed.
        device: Where to train.
        model: The model.
        shape: Shape (C, H, W) of the images.

    Raises:
        UsageError: If the model does not take images of the recipe's ``initial_size``.
    """
    require_any_size(model, shape, recipe)
    if recipe.precision != "auto":
        return recipe.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    file = cache_dir() / "precision.json"
    known: dict[str, Any] = {}
    with contextlib.suppress(ConvlensError):  # a missing or damaged file only costs another measurement
        known = read_json(file)
    sizes = [shape]
    if recipe.initial_size:
        sizes.append((shape[0], *resized_shape(shape[1:], recipe.initial_size)))
    results, tried = [], False
    # cloud machines share one name between several kinds of processors
    processor = f"{processor_name()} with{'' if has_bf16() else 'out'} bf16"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other if another program is busy
    try:
        for layer, given in [layer for size in sizes for layer in find_convolutions(model, size)]:
            key = f"{processor}, torch {torch.__version__}: {layer} on {given}"
            if not is_result(known.get(key)):
                known[key], tried = try_convolution(layer, given), True
            results.append(known[key])
    finally:
        torch.set_num_threads(threads)
    if tried:
        with contextlib.suppress(ConvlensError):  # a full or read-only disk only costs another measurement
            write_json(file, known)
    right = all(result["right"] for result in results)
    seconds = {kind: sum(result[kind] for result in results) for kind in ("fp32", "bf16")}
    return "bf16" if right and seconds["bf16"] < MAX_TIME_FRACTION * seconds["fp32"] else "fp32"


def is_result(value: object) -> bool:
    """Return True if a value from the cache has the form of :func:`try_convolution`'s result."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("right"), bool)
        and all(isinstance(value.get(kind), float) for kind in ("fp32", "bf16"))
    )


def find_convolutions(model: nn.Module, shape: tuple[int, int, int]) -> list[Convolution]:
    """Return the convolutions of ``model`` in the order in which an image (C, H, W) passes them."""
    found: list[Convolution] = []

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            found.append((layer, tuple(inputs[0].shape[1:])))

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.Conv2d)]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *shape, device=next(model.parameters()).device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


def try_convolution(layer: nn.Conv2d, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the seconds of a convolution like ``layer`` in fp32 and bf16, and whether bf16 is correct."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(PROBE_IMAGES, *shape, generator=g).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(layer.weight.shape, generator=g).contiguous(memory_format=torch.channels_last)
    weight = (weight / weight[0].numel() ** 0.5).requires_grad_()
    slope: Tensor | None = None
    seconds: dict[str, float] = {"fp32": float("inf"), "bf16": float("inf")}
    values: dict[str, list[Tensor]] = {}
    try:
        for _ in range(PROBE_ROUNDS):  # alternating, and the fastest of each: another program may be busy
            for precision in seconds:
                start = time.perf_counter()
                with autocast(precision, torch.device("cpu")):
                    y = nn.functional.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
                y = y.float()
                slope = torch.randn(y.shape, generator=g) if slope is None else slope
                # not grad(y, ..., slope): to check its shape PyTorch imports SymPy, which takes 0.3 s
                y.register_hook(lambda _, slope=slope: slope)  # type: ignore[no-untyped-call]
                gradients = torch.autograd.grad(y.sum(), [x, weight])
                seconds[precision] = min(seconds[precision], time.perf_counter() - start)
                values[precision] = [y.detach(), *gradients]
    except RuntimeError:  # no bf16 convolution for this shape or on this machine
        return {"fp32": 0.0, "bf16": 0.0, "right": False}
    right = all(
        bool((exact - near).abs().max() <= TOLERANCE * exact.abs().max())
        for exact, near in zip(values["fp32"], values["bf16"], strict=True)
    )
    return {**seconds, "right": right}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which convolutions and linear layers compute in ``precision``, "fp32" or "bf16"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
