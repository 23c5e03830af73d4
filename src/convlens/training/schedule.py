"""Length, learning rate and image size of a training, as functions of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from convlens.data.resize import downscale, resized_shape
from convlens.errors import UsageError
from convlens.system.memory import is_out_of_memory
from convlens.training.clock import TrainClock
from convlens.training.recipe import Recipe
from convlens.training.state import TrainState

LOG_EVERY_STEPS = 20  # an accelerator waits when metrics are read


class Schedule:
    """Position in a training: its length, and the learning rate and image size of the next step.

    All are functions of the recipe and the state, so a resumed training needs nothing else.

    Args:
        recipe: How the model is trained.
        state: State of the training.
        steps_per_epoch: Number of batches of an epoch.
        shape: Shape (C, H, W) of the images.
    """

    def __init__(self, recipe: Recipe, state: TrainState, steps_per_epoch: int, shape: tuple[int, int, int]):
        self.steps_per_epoch = steps_per_epoch
        self._recipe, self._state, self._shape = recipe, state, shape
        self._fixed = recipe.total_steps(steps_per_epoch) if recipe.max_seconds is None else None

    @property
    def total(self) -> int:
        """Number of steps of the whole training; with ``max_seconds`` an estimate that changes with the clock."""
        if self._fixed is not None:
            return self._fixed
        step = self._state.step  # before the first step there is no throughput, whatever time has passed
        seconds = equivalent_seconds(self._recipe, self._shape, self._state.elapsed) if step else 0.0
        return self._recipe.total_steps(self.steps_per_epoch, step, seconds)

    @property
    def finished(self) -> bool:
        """True after the last step, or once early stopping has ended the training."""
        return self._state.finished or self._state.step >= self.total

    @property
    def epoch_finished(self) -> bool:
        """True after the last step of an epoch; the last epoch may be a partial one."""
        return self._state.step % self.steps_per_epoch == 0 or self.finished

    @property
    def log_due(self) -> bool:
        """True after every 20th step, and after the last step of an epoch."""
        return self._state.step % LOG_EVERY_STEPS == 0 or self.epoch_finished

    @property
    def save_due(self) -> bool:
        """True where the recipe's ``save_every`` asks for a checkpoint within an epoch."""
        every = self._recipe.save_every
        return bool(every) and self._state.step % every == 0 and not self.epoch_finished

    @property
    def snapshot_due(self) -> bool:
        """True before the first step, at the end of an epoch, and after 1, 2, 4, 8, ... steps of the first."""
        return is_snapshot_step(self._state.step, self.steps_per_epoch, self.total)

    @property
    def epoch(self) -> int:
        """Number of the epoch, from 1, that the next step belongs to."""
        return self._state.step // self.steps_per_epoch + 1

    @property
    def epochs(self) -> int | None:
        """Number of epochs; None with ``max_seconds``."""
        return None if self._recipe.max_seconds else math.ceil(self.total / self.steps_per_epoch)

    @property
    def position(self) -> str:
        """The number of steps done, and of how many, as far as that is known."""
        return f"step {self._state.step}" + ("" if self._recipe.max_seconds else f" of {self.total}")

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return learning_rate(self._recipe, self._state.step, self.total, self.steps_per_epoch)

    @property
    def image_size(self) -> int:
        """Longest side in pixels of the images of the next step: progressive resizing (Howard 2018)."""
        small = self._recipe.initial_size and self._state.step < self._recipe.initial_size_fraction * self.total
        return self._recipe.initial_size if small else max(self._shape[1:])

    def epoch_done(self, clock: TrainClock) -> float:
        """Return the fraction, 0..1, of this epoch's work that is done, since it was started or resumed."""
        if self.epoch_finished:
            return 1.0
        end = min(self.epoch * self.steps_per_epoch, self.total)
        return self._work(clock.first_step, self._state.step) / self._work(clock.first_step, end)

    def eta(self, clock: TrainClock) -> float:
        """Return the seconds that are left, at the throughput of this epoch, which another process may have resumed."""
        if self._recipe.max_seconds is not None:
            return max(self._recipe.max_seconds - self._state.elapsed, 0.0)
        ahead = self._work(self._state.step, self.total)
        return clock.epoch_seconds / self._work(clock.first_step, self._state.step) * ahead

    def _work(self, start: int, stop: int) -> float:
        return work_between(self._recipe, self._shape, self.total, start, stop)


def learning_rate(recipe: Recipe, step: int, total: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step.

    All schedules start with a linear warmup over ``warmup_fraction`` of the steps. ``cosine`` and ``linear`` then fall
    to 0 at the end. ``one-cycle`` rises from 1/25 of the peak over the first 30% (or ``warmup_fraction``) and falls,
    both along a cosine (Smith 2018).

    Args:
        recipe: How the model is trained.
        step: Number of the step, from 0.
        total: Number of steps of the whole training.
        steps_per_epoch: Number of steps of an epoch, for the ``step`` schedule.
    """
    rise = (recipe.warmup_fraction or (0.3 if recipe.lr_schedule == "one-cycle" else 0.0)) * total
    if step < rise:
        fraction = (step + 1) / (rise + 1)
        if recipe.lr_schedule == "one-cycle":
            return recipe.lr * (1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * fraction)) / 2)
        return recipe.lr * fraction
    if recipe.lr_schedule == "constant":
        return recipe.lr
    if recipe.lr_schedule == "step":
        return recipe.lr * recipe.lr_gamma ** (step // steps_per_epoch // recipe.lr_step_size)
    left = 1 - (step - rise) / (total - rise)
    return recipe.lr * (left if recipe.lr_schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def is_snapshot_step(step: int, steps_per_epoch: int, total: int) -> bool:
    """Return True if the weights after ``step`` steps make a snapshot: most are early, where weights change most."""
    return step >= total or step % steps_per_epoch == 0 or (step < steps_per_epoch and step.bit_count() == 1)


@torch.no_grad()
def require_any_size(model: nn.Module, shape: tuple[int, int, int], recipe: Recipe) -> None:
    """Raise UsageError if ``model`` does not take images of ``shape`` (C, H, W) at the recipe's initial size."""
    if not recipe.initial_size:
        return
    image = torch.zeros(1, *shape, device=next(model.parameters()).device)
    training = model.training
    try:
        model.eval()(downscale(image, recipe.initial_size))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"`initial_size` is {recipe.initial_size}: the model {recipe.model} does not take images of that size"
        ) from None
    finally:
        model.train(training)


def equivalent_seconds(recipe: Recipe, shape: tuple[int, int, int], elapsed: float) -> float:
    """Return the time that the steps so far would have taken if all steps of the training cost the same.

    With progressive resizing the first steps are cheaper, so after half of ``max_seconds`` more than half of the steps
    are done. The learning rate shall fall evenly with the steps, not with the clock.

    Args:
        recipe: How the model is trained.
        shape: Shape (C, H, W) of the images.
        elapsed: Seconds so far.
    """
    if recipe.max_seconds is None or not recipe.initial_size:
        return elapsed
    cost, fraction = relative_step_cost(recipe, shape), recipe.initial_size_fraction
    work = elapsed / recipe.max_seconds * (fraction * cost + 1 - fraction)  # 1: all steps at full size
    done = min(work, fraction * cost) / cost + max(work - fraction * cost, 0.0)  # fraction of all steps
    return done * recipe.max_seconds


def relative_step_cost(recipe: Recipe, shape: tuple[int, int, int]) -> float:
    """Return the cost of a step at the initial size, relative to one at full size (C, H, W): the ratio of pixels."""
    return math.prod(resized_shape(shape[1:], recipe.initial_size)) / math.prod(shape[1:])


def work_between(recipe: Recipe, shape: tuple[int, int, int], total: int, start: int, stop: int) -> float:
    """Return the work of the steps from ``start`` to before ``stop``, in steps at full size.

    A step at the initial size counts its :func:`relative_step_cost`. With ``max_seconds``, where ``total`` is an
    estimate, every step counts 1.

    Args:
        recipe: How the model is trained.
        shape: Shape (C, H, W) of the images.
        total: Number of steps of the whole training.
        start: First step, from 0.
        stop: Step after the last.
    """
    if not recipe.initial_size or recipe.max_seconds is not None:
        return stop - start
    small = max(min(math.ceil(recipe.initial_size_fraction * total), stop) - start, 0)
    return stop - start - small * (1 - relative_step_cost(recipe, shape))
