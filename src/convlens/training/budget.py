"""From a time budget to a recipe: measure this machine for a moment, then pick the net and the seconds that fit."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence

import torch

from convlens.data.dataset import Dataset
from convlens.data.preprocess import Preprocess
from convlens.errors import UsageError
from convlens.evaluation.trust import FEW
from convlens.training.engine import fit
from convlens.training.nets import describe_net, make_net
from convlens.training.recipe import Recipe
from convlens.training.recipes import LADDERS, default_recipe, get_recipe

FINISH_SECONDS = 3.5  # drawing and writing the report
PROBE_BATCH, PROBE_STEPS = 128, 4
UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


def parse_budget(text: str) -> float:
    """Return the seconds that ``90``, ``90s``, ``1.5m`` or ``1h`` says; UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|)", text.strip())
    if not match or not float(match[1]):
        raise UsageError(f"--budget takes a time such as 60s, 5m or 1h, not {text!r}")
    return float(match[1]) * UNITS[match[2]]


def candidates(data_name: str, recipe: Recipe | None) -> list[Recipe]:
    """Return the recipes a budget may choose from, the quickest first: the data's own ladder, or just ``recipe``."""
    if recipe is not None:
        return [recipe]
    return [get_recipe(name) for name in LADDERS.get(data_name, ())] or [default_recipe(data_name)]


def fit_into(budget: float, started: float, dataset: Dataset, choices: Sequence[Recipe]) -> Recipe:
    """Return the richest of ``choices`` whose whole length fits into the budget, cut or stretched to just that.

    ``budget`` is the seconds of the whole command, which began at ``started`` (time.perf_counter): what loading took,
    and what testing and the report will take, go off it. Raises UsageError if nothing is left.
    """
    chosen, finishing = choices[0], 0.0
    for number, recipe in enumerate(choices):
        pace = measure_pace(dataset, recipe)  # images a second
        passes = 1 + recipe.test_views * (6 if recipe.flip else 3)
        divided = dataset.with_validation(recipe.validation, recipe.seed)
        train = len(divided.train)
        # what Trust.fit looks at
        looked_at = len(divided.validation) + min(train, FEW) if divided.validation is not None else 0
        after = FINISH_SECONDS + (passes * len(dataset.test) + looked_at) / pace
        images = recipe.total_steps(max(train // recipe.batch_size, 1)) * recipe.batch_size
        if number and images / pace > budget - (time.perf_counter() - started) - after:
            break  # the one before it is as much as fits
        chosen, finishing = recipe, after
    seconds = budget - (time.perf_counter() - started) - finishing
    if seconds < 0.5:
        spent = budget - seconds
        raise UsageError(f"--budget {budget:g}s is too short: loading, testing and the report take {spent:.0f} s here")
    return chosen.override(seconds=seconds)


def measure_pace(dataset: Dataset, recipe: Recipe) -> float:
    """Return how many images a second ``recipe`` trains on here, from a few small steps; its first is not counted."""
    batch = min(PROBE_BATCH, len(dataset.train))
    few = dataclasses.replace(dataset, train=dataset.train.take(torch.arange(batch)), validation=None)
    # a learning rate of 0: the net is only timed
    small = recipe.override(
        batch_size=batch, lr=0.0, head_lr=0.0, bias_lr=0.0, validation=0.0, select="last", patience=0, watch_test=False
    )
    preprocess = Preprocess.measure(few.train.images, dataset.style)
    seconds = []
    with torch.random.fork_rng():
        for steps in (1, 1 + PROBE_STEPS):
            net = make_net(describe_net(small, few), few, preprocess)
            record = list(fit(net, few, small.override(iterations=steps), preprocess=preprocess))[-1]
            seconds.append(record.seconds)
    return batch * PROBE_STEPS / max(seconds[1] - seconds[0], 1e-3)
