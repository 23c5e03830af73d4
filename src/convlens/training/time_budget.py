"""From a time budget to a recipe: measure this machine for a moment, then pick the net and the seconds that fit."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from convlens.data.dataset import Dataset
from convlens.data.preprocess import Preprocess
from convlens.errors import UsageError
from convlens.evaluation.inference import compute_logits
from convlens.evaluation.uncertainty import MAX_FEATURE_IMAGES
from convlens.system.device import select_device
from convlens.system.random import preserve_rng_state
from convlens.training.build import make_model, model_config
from convlens.training.loop import fit
from convlens.training.precision import choose_precision
from convlens.training.recipe import Recipe
from convlens.training.recipes import BUDGET_RECIPES, default_recipe, get_recipe
from convlens.training.schedule import work_between

FINISH_SECONDS = 1.2  # drawing and writing the report

MIN_TRAIN_SECONDS = (
    0.5  # of a recipe's length: cut to it, none that was tried (docs, log) was 0.05 points behind the one below
)

PROBE_SECONDS = 0.25  # what is quicker is measured again, twice as often

PROBE_BATCHES = 8

UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


def parse_budget(text: str) -> float:
    """Return the seconds that ``90``, ``90s``, ``1.5m`` or ``1h`` says; UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|)", text.strip())
    if not match or not float(match[1]):
        raise UsageError(f"--budget takes a time such as 60s, 5m or 1h, not {text!r}")
    return float(match[1]) * UNITS[match[2]]


def budget_candidates(data_name: str, recipe: Recipe | None) -> list[Recipe]:
    """Return the recipes a budget may choose from, the quickest first: the data's own ladder, or just ``recipe``.

    They are tested without test-time augmentation, whose time is worth more in training.
    """
    ladder = [get_recipe(name) for name in BUDGET_RECIPES.get(data_name, ())] or [default_recipe(data_name)]
    return [choice.override(tta=False) for choice in ([recipe] if recipe is not None else ladder)]


def choose_for_budget(budget: float, started: float, dataset: Dataset, choices: Sequence[Recipe]) -> Recipe:
    """Return the richest of ``choices`` of which at least half fits into the budget, cut or stretched to just that.

    ``budget`` is the seconds of the whole command, which began at ``started`` (time.perf_counter): what loading took,
    and what testing and the report will take, go off it. Raises UsageError if nothing is left.
    """
    chosen, finishing = choices[0], 0.0
    for number, recipe in enumerate(choices):
        pace = measure_throughput(dataset, recipe)
        passes = 1 + recipe.tta * (6 if recipe.hflip else 3)
        divided = dataset.with_validation(recipe.val_fraction, recipe.seed)
        train = len(divided.train)
        # what Trust.fit looks at
        looked_at = len(divided.validation) + min(train, MAX_FEATURE_IMAGES) if divided.validation is not None else 0
        after = FINISH_SECONDS + (passes * len(dataset.test) + looked_at) / pace.testing
        steps = recipe.total_steps(max(train // recipe.batch_size, 1))
        images = work_between(recipe, dataset.shape, steps, 0, steps) * min(recipe.batch_size, train)
        if number and MIN_TRAIN_SECONDS * images / pace.training > budget - (time.perf_counter() - started) - after:
            break  # the one before it is as much as fits
        chosen, finishing = recipe, after
    seconds = budget - (time.perf_counter() - started) - finishing
    if seconds < 0.5:
        spent = budget - seconds
        raise UsageError(f"--budget {budget:g}s is too short: loading, testing and the report take {spent:.0f} s here")
    return chosen.override(max_seconds=seconds)


@dataclass(frozen=True)
class Throughput:
    """How many images a second a net is trained on, none of them made smaller, and how many it answers."""

    training: float
    testing: float


def measure_throughput(dataset: Dataset, recipe: Recipe) -> Throughput:
    """Return the pace of ``recipe`` on this machine, from a few steps and answers."""
    # one part, as in_parts makes them, stands for a step: the update that comes with each costs little beside it
    part = recipe.batch_size // max(min(recipe.grad_accum_steps, recipe.batch_size // 2), 1)
    batch = max(min(part, len(dataset.train)), 1)
    rows = torch.arange(min(len(dataset.train) // batch, PROBE_BATCHES) * batch)
    few = dataclasses.replace(dataset, train=dataset.train.select(rows), validation=None)
    # a learning rate of 0: the net is only timed
    idle = recipe.override(
        batch_size=batch,
        grad_accum_steps=1,
        initial_size=0,
        lr=0.0,
        head_lr=0.0,
        bias_lr=0.0,
        val_fraction=0.0,
        restore_best=False,
        patience=0,
        log_test_metrics=False,
    )
    preprocess = Preprocess.fit(few.train.images, dataset.input_style)
    images, normalise = few.train.images[:batch], preprocess.normalizer()

    def train(steps: int) -> float:
        return list(fit(net, few, idle.override(max_steps=steps), preprocess=preprocess))[-1].seconds

    def answer(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            compute_logits(net, images, normalise).cpu()
        return time.perf_counter() - started

    with preserve_rng_state():
        net = make_model(model_config(idle, few), few, preprocess)
        # tried here, for the clock is running; on smaller images too
        precision = choose_precision(recipe, select_device(recipe.device), net, dataset.shape)
        idle = idle.override(precision=precision)
        return Throughput(batch * measure_rate(train), batch * measure_rate(answer))


def measure_rate(work: Callable[[int], float]) -> float:
    """Return how often a second something can be done; ``work`` does it a number of times and returns the seconds."""
    work(1)  # the first time, much is slower
    times = 2
    # once more when it took long enough: another program may have been busy
    while (seconds := work(times)) < PROBE_SECONDS or (seconds := min(seconds, work(times))) < PROBE_SECONDS:
        times *= 2
    return times / seconds
