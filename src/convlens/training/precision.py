"""Precision of training: fp32, or bf16 where this machine computes the net's own convolutions faster and right."""

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

BATCH, ROUNDS = 64, 4
TOLERANCE = 0.02  # of the largest value; bf16 itself keeps about 3 digits
GAIN = 0.9  # bf16 must take less than this share of fp32's time

Convolution = tuple[nn.Conv2d, tuple[int, ...]]  # a layer, and the (C, H, W) that it is given


def choose_precision(recipe: Recipe, device: torch.device, net: nn.Module, shape: tuple[int, int, int]) -> str:
    """Return "fp32" or "bf16" for training ``net`` on images of ``shape`` (C, H, W), smaller at first or not.

    ``auto`` on a CPU tries every convolution of the net, forward and backward, both ways: bf16 is taken if all are
    right and together faster, for some shapes fall off the fast path, and some have come out wrong. What was found
    is kept in the user's cache, by processor, PyTorch version and shape.
    Raises UsageError if the net does not take the smaller images of the recipe.
    """
    require_any_size(net, shape, recipe)
    if recipe.precision != "auto":
        return recipe.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    file = cache_dir() / "precision.json"
    known: dict[str, Any] = {}
    with contextlib.suppress(ConvlensError):  # no file yet, or a damaged one: everything is tried again
        known = read_json(file)
    sizes = [shape]
    if recipe.initial_size:
        sizes.append((shape[0], *resized_shape(shape[1:], recipe.initial_size)))
    results, tried = [], False
    # the name of a rented processor may stand for several kinds
    processor = f"{processor_name()} with{'' if has_bf16() else 'out'} bf16"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other while another program is busy
    try:
        for layer, given in [layer for size in sizes for layer in find_convolutions(net, size)]:
            key = f"{processor}, torch {torch.__version__}: {layer} on {given}"
            if not is_result(known.get(key)):
                known[key], tried = try_convolution(layer, given), True
            results.append(known[key])
    finally:
        torch.set_num_threads(threads)
    if tried:
        with contextlib.suppress(ConvlensError):  # a full or read-only disk costs the next run a moment
            write_json(file, known)
    right = all(result["right"] for result in results)
    seconds = {kind: sum(result[kind] for result in results) for kind in ("fp32", "bf16")}
    return "bf16" if right and seconds["bf16"] < GAIN * seconds["fp32"] else "fp32"


def is_result(value: object) -> bool:
    """Say whether a value from the cache is what :func:`try_convolution` returns."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("right"), bool)
        and all(isinstance(value.get(kind), float) for kind in ("fp32", "bf16"))
    )


def find_convolutions(net: nn.Module, shape: tuple[int, int, int]) -> list[Convolution]:
    """Return the convolutions of ``net`` in the order in which an image (C, H, W) passes them."""
    found: list[Convolution] = []

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            found.append((layer, tuple(inputs[0].shape[1:])))

    handles = [m.register_forward_hook(hook) for m in net.modules() if isinstance(m, nn.Conv2d)]
    training = net.training
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, *shape, device=next(net.parameters()).device))
    finally:
        net.train(training)
        for handle in handles:
            handle.remove()
    return found


def try_convolution(layer: nn.Conv2d, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the seconds that a convolution like ``layer`` takes in fp32 and bf16, and whether bf16 is right."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, *shape, generator=g).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(layer.weight.shape, generator=g).contiguous(memory_format=torch.channels_last)
    weight = (weight / weight[0].numel() ** 0.5).requires_grad_()
    slope: Tensor | None = None
    seconds: dict[str, float] = {"fp32": float("inf"), "bf16": float("inf")}
    values: dict[str, list[Tensor]] = {}
    try:
        for _ in range(ROUNDS):  # in turn, and the fastest of each: another program may be busy
            for precision in seconds:
                start = time.perf_counter()
                with autocast(precision, torch.device("cpu")):
                    y = nn.functional.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
                y = y.float()
                slope = torch.randn(y.shape, generator=g) if slope is None else slope
                # not grad(y, ..., slope), for which PyTorch imports SymPy, a third of a second
                y.register_hook(lambda _, slope=slope: slope)  # type: ignore[no-untyped-call]
                gradients = torch.autograd.grad(y.sum(), [x, weight])
                seconds[precision] = min(seconds[precision], time.perf_counter() - start)
                values[precision] = [y.detach(), *gradients]
    except RuntimeError:  # a shape, or a machine, that has no bf16 convolution
        return {"fp32": 0.0, "bf16": 0.0, "right": False}
    right = all(
        bool((exact - near).abs().max() <= TOLERANCE * exact.abs().max())
        for exact, near in zip(values["fp32"], values["bf16"], strict=True)
    )
    return {**seconds, "right": right}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which convolutions and linear layers compute in ``precision``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
