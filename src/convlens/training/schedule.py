"""Learning rate, image size and length of a training, as functions of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from convlens.data.resize import downscale, resized_shape
from convlens.errors import UsageError
from convlens.training.grad_accum import is_out_of_memory
from convlens.training.recipe import Recipe


def learning_rate(recipe: Recipe, step: int, total: int, steps_per_epoch: int) -> float:
    """Return the learning rate of ``step`` (from 0) of ``total``: a pure function, so that resuming restores nothing.

    All rise in a line over ``warmup`` of the steps; ``cosine`` and ``linear`` fall to 0 at the end; ``one-cycle``
    rises from 1/25 of the peak over the first 30% (or ``warmup``) and falls, both along a cosine (Smith 2018).
    """
    rise = (recipe.warmup_fraction or (0.3 if recipe.lr_schedule == "one-cycle" else 0.0)) * total
    if step < rise:
        share = (step + 1) / (rise + 1)
        if recipe.lr_schedule == "one-cycle":
            return recipe.lr * (1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * share)) / 2)
        return recipe.lr * share
    if recipe.lr_schedule == "constant":
        return recipe.lr
    if recipe.lr_schedule == "step":
        return recipe.lr * recipe.lr_gamma ** (step // steps_per_epoch // recipe.lr_step_size)
    left = 1 - (step - rise) / (total - rise)
    return recipe.lr * (left if recipe.lr_schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


@torch.no_grad()
def require_any_size(net: nn.Module, shape: tuple[int, int, int], recipe: Recipe) -> None:
    """Raise UsageError unless ``net`` takes images of ``shape`` (C, H, W) at the recipe's small size too, if any."""
    if not recipe.initial_size:
        return
    image = torch.zeros(1, *shape, device=next(net.parameters()).device)
    training = net.training
    try:
        net.eval()(downscale(image, recipe.initial_size))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"--initial-size {recipe.initial_size}: the net {recipe.model} does not take images of that size"
        ) from None
    finally:
        net.train(training)


def equivalent_seconds(recipe: Recipe, shape: tuple[int, int, int], elapsed: float) -> float:
    """Return how long a training by the clock would have taken so far if each of its steps took the same time.

    Those on smaller images come first and are quicker: after half of the time more than half of the steps are done.
    """
    if recipe.max_seconds is None or not recipe.initial_size:
        return elapsed
    cost, share = relative_step_cost(recipe, shape), recipe.initial_size_fraction
    work = (
        elapsed / recipe.max_seconds * (share * cost + 1 - share)
    )  # of all steps, in whole ones; a small one is a share
    done = min(work, share * cost) / cost + max(work - share * cost, 0.0)  # of all steps
    return done * recipe.max_seconds


def relative_step_cost(recipe: Recipe, shape: tuple[int, int, int]) -> float:
    """Return the share of the pixels of images (C, H, W) that smaller ones have."""
    return math.prod(resized_shape(shape[1:], recipe.initial_size)) / math.prod(shape[1:])


def work_between(recipe: Recipe, shape: tuple[int, int, int], total: int, start: int, stop: int) -> float:
    """Return the work of the steps from ``start`` to before ``stop`` of ``total``, on images of ``shape`` (C, H, W).

    A step counts 1; one on smaller images counts the share of the pixels that they have. By the clock, where ``total``
    is a guess that changes, each counts 1.
    """
    if not recipe.initial_size or recipe.max_seconds is not None:
        return stop - start
    small = max(min(math.ceil(recipe.initial_size_fraction * total), stop) - start, 0)
    return stop - start - small * (1 - relative_step_cost(recipe, shape))
