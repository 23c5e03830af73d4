"""Refuse values that no trial could train with, before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from convlens.data.dataset import Dataset
from convlens.data.preprocess import Preprocess
from convlens.errors import UsageError
from convlens.sweep.space import Choice, Range, Space, display_name
from convlens.system.random import preserve_rng_state
from convlens.system.text import first_few
from convlens.training.build import drop_unsupported_options, make_model, model_config, require_possible
from convlens.training.recipe import MODEL_OPTIONS, Recipe
from convlens.training.schedule import require_any_size


def require_trainable(base: Recipe, dataset: Dataset, space: Space, overrides: Collection[str]) -> None:
    """Try each value of the space with the base recipe, and with every value of one other searched field in turn.

    Values that fail only in other combinations fail in their trials. Models are built on 100 of the images.
    Raises UsageError for a value that trains with none of them, or a model option in ``overrides`` that no model has.
    """
    few = dataclasses.replace(dataset, train=dataset.train.select(dataset.train.evenly_spaced(100)))
    preprocess = Preprocess.fit(few.train.images, few.input_style)
    found = {name: probe_values(name, values) for name, values in space.items()}

    def require(values: dict[str, Any], kept_options: Collection[str]) -> None:
        reasons: dict[str, None] = {}  # an ordered set
        for other in ({}, *({n: value} for n in space if n not in values for value in found[n])):
            try:
                recipe = drop_unsupported_options(base.override(**other, **values), kept_options)
                return require_one(recipe, few, preprocess)
            except UsageError as error:
                reasons[str(error)] = None
        raise UsageError(first_few(list(reasons), 2, "; "))

    for option in ((), *((name,) for name in MODEL_OPTIONS if name in overrides)):
        require({}, option)
    for name, values in space.items():
        for value in found[name]:
            try:
                require({name: value}, {name})
            except UsageError as error:
                shown = Choice((value,)) if isinstance(values, Choice) or name in MODEL_OPTIONS else values
                raise UsageError(f"cannot search `{display_name(name)}={shown}`: {error}") from None


def require_one(recipe: Recipe, dataset: Dataset, preprocess: Preprocess) -> None:
    """Raise UsageError unless the recipe's model can be built for these images, and its loss fits the model."""
    try:
        with preserve_rng_state():
            model = make_model(model_config(recipe, dataset), dataset, preprocess)
    except UsageError:
        raise
    except Exception as error:  # the user's own model may raise anything
        reason = str(error).split("\n", 1)[0]
        raise UsageError(f"model {recipe.model!r} cannot be built: {reason}") from None
    require_any_size(model, dataset.shape, recipe)
    require_possible(recipe, model, dataset)


def probe_values(name: str, values: Range | Choice) -> tuple[Any, ...]:
    """Return the values to try: all choices; the middle of a range, or both ends if it shapes the model."""
    if isinstance(values, Choice):
        return values.values
    # the ends of other ranges may be invalid by themselves, as momentum 0 with `nesterov`, and are never drawn
    return (values.low, values.high) if name in MODEL_OPTIONS else (values.middle(),)
