"""Choose a recipe and its training time from a time budget, by measuring this machine for a moment."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from convlens.data.dataset import Dataset
from convlens.errors import UsageError
from convlens.evaluation.uncertainty import MAX_FEATURE_IMAGES
from convlens.training.recipe import Recipe
from convlens.training.recipes import BUDGET_RECIPES, default_recipe, get_recipe
from convlens.training.schedule import work_between
from convlens.training.throughput import measure_throughput

FINISH_SECONDS = 1.2  # for drawing and writing the report
# of a recipe's own length: cut to half, no recipe was more than 0.05 points behind the next smaller one
MIN_TRAIN_FRACTION = 0.5
UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


def parse_budget(text: str) -> float:
    """Return the seconds of ``90``, ``90s``, ``1.5m`` or ``1h``; UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|)", text.strip())
    if not match or not float(match[1]):
        raise UsageError(f"`budget` takes a time such as 60s, 5m or 1h, not {text!r}")
    return float(match[1]) * UNITS[match[2]]


def budget_candidates(data_name: str, recipe: Recipe | None) -> list[Recipe]:
    """Return the recipes a budget may choose from, the fastest first: those of the data set, or just ``recipe``.

    They go without test-time augmentation, whose time is worth more in training.
    """
    ladder = [get_recipe(name) for name in BUDGET_RECIPES.get(data_name, ())] or [default_recipe(data_name)]
    return [choice.override(tta=False) for choice in ([recipe] if recipe is not None else ladder)]


def choose_for_budget(budget: float, started: float, dataset: Dataset, choices: Sequence[Recipe]) -> Recipe:
    """Return the longest of ``choices`` of which at least half fits, cut or stretched to the budget.

    Args:
        budget: Seconds that the whole command may take: loading, training, evaluation and report.
        started: Start of the command, as time.perf_counter.
        dataset: The data set.
        choices: Recipes, the fastest first.

    Raises:
        UsageError: If no time is left for training.
    """
    chosen, finishing = choices[0], 0.0
    for number, recipe in enumerate(choices):
        throughput = measure_throughput(dataset, recipe)
        passes = 1 + recipe.tta * (6 if recipe.hflip else 3)
        divided = dataset.with_validation(recipe.val_fraction, recipe.seed)
        train = len(divided.train)
        # UncertaintyModel.fit needs the features of these images
        calibration = len(divided.validation) + min(train, MAX_FEATURE_IMAGES) if divided.validation is not None else 0
        after = FINISH_SECONDS + (passes * len(dataset.test) + calibration) / throughput.inference
        steps = recipe.total_steps(max(train // recipe.batch_size, 1))
        images = work_between(recipe, dataset.shape, steps, 0, steps) * min(recipe.batch_size, train)
        left = budget - (time.perf_counter() - started) - after
        if number and MIN_TRAIN_FRACTION * images / throughput.training > left:
            break  # the one before is the longest that fits
        chosen, finishing = recipe, after
    seconds = budget - (time.perf_counter() - started) - finishing
    if seconds < 0.5:
        spent = budget - seconds
        raise UsageError(f"`budget` {budget:g}s is too short: loading, testing and the report take {spent:.0f} s here")
    return chosen.override(max_seconds=seconds)
