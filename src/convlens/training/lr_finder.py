"""Find a learning rate with a range test (L. Smith 2015)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convlens.data.dataset import Dataset
from convlens.data.preprocess import Preprocess
from convlens.data.resize import downscale
from convlens.distributed.process_group import World
from convlens.system.progress import track
from convlens.training.build import TrainSetup, make_model, model_config
from convlens.training.recipe import Recipe
from convlens.training.step import forward_backward

STEPS = 100
MIN_LR, MAX_LR = 1e-5, 10.0
SMOOTHING = 0.9  # decay of the moving average of the loss
EXPLOSION_FACTOR = 3.0  # times the lowest loss: the test ends


@dataclass(frozen=True)
class RangeTest:
    """Result of a learning-rate range test.

    Attributes:
        rates: Learning rate of every step.
        losses: Smoothed training loss of every step, in nats.
        steepest: Learning rate at which the loss fell most.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    steepest: float

    @property
    def lowest(self) -> float:
        """Learning rate at which the loss was lowest; larger ones undo what was learned."""
        return self.rates[self.losses.index(min(self.losses))]

    @property
    def suggestion(self) -> float:
        """Geometric mean of both rates: the loss was falling, and had not begun to rise."""
        return math.sqrt(self.steepest * self.lowest)


class RangeTestTrainer:
    """A model in training at learning rates that the caller chooses, on training images alone."""

    def __init__(self, dataset: Dataset, recipe: Recipe):
        recipe = recipe.override(ema_decay=0.0, restore_best=False, patience=0)
        dataset = dataset.with_validation(recipe.val_fraction, recipe.seed)
        preprocess = Preprocess.fit(dataset.train.images, dataset.input_style)
        torch.manual_seed(recipe.seed)
        model = make_model(model_config(recipe, dataset), dataset, preprocess)
        self.setup = TrainSetup.build(model, dataset, recipe, preprocess, World())
        model.train()

    def step(self, number: int, lr: float) -> Tensor:
        """Take step ``number`` (from 0) and return its loss, before the update, a scalar on the device."""
        setup = self.setup
        images, labels, _ = next(setup.batches(number))  # (N, C, H, W), (N,) or (N, K)
        setup.optimizer.zero_grad()
        loss, _ = forward_backward(setup, downscale(images, setup.recipe.initial_size or max(setup.shape)), labels)
        setup.clip()
        setup.optimizer.step(lr)
        return loss


def find_lr(dataset: Dataset, recipe: Recipe, steps: int = STEPS) -> RangeTest:
    """Run a range test: the learning rate grows by the same factor every step, until the loss explodes.

    Args:
        dataset: Training images.
        recipe: How to train; ``head_lr`` and ``bias_lr`` grow in proportion.
        steps: Number of steps from the lowest to the highest rate.
    """
    trainer = RangeTestTrainer(dataset, recipe)
    rates, losses, mean = list[float](), list[float](), 0.0
    for number in track(range(steps), "looking for a learning rate", steps):
        lr = MIN_LR * (MAX_LR / MIN_LR) ** (number / (steps - 1))
        loss = float(trainer.step(number, lr))
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smooth = mean / (1 - SMOOTHING ** (number + 1))
        if not math.isfinite(smooth) or (losses and smooth > EXPLOSION_FACTOR * min(losses)):
            break
        rates.append(lr)
        losses.append(smooth)
    return RangeTest(tuple(rates), tuple(losses), steepest(rates, losses))


def steepest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Return the rate at which the loss falls most over its logarithm, by central differences.

    The first tenth is left out: the average of the first few losses is not smooth yet.
    """
    first = max(len(rates) // 10, 1)
    slopes = {i: losses[i + 1] - losses[i - 1] for i in range(first, len(rates) - 1)}
    return rates[min(slopes, key=slopes.__getitem__)] if slopes else rates[0]


def with_lr(recipe: Recipe, lr: float) -> dict[str, float]:
    """Return the recipe's learning rates scaled so that ``lr`` is the main one; rounded to two digits."""
    lr = float(f"{lr:.2g}")
    scale = lr / recipe.lr if recipe.lr else 1.0
    own = {name: float(f"{value * scale:.2g}") for name in ("head_lr", "bias_lr") if (value := getattr(recipe, name))}
    return {"lr": lr, **own}
