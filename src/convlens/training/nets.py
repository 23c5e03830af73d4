"""From a recipe and its data to a fresh net."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from convlens.data.dataset import Dataset
from convlens.data.preprocess import Preprocess
from convlens.errors import UsageError
from convlens.models import ConvNet, create_model, model_options
from convlens.training.memory import is_out_of_memory
from convlens.training.recipe import Recipe

MILLION = 1_000_000  # pixels that a fresh net may look at


def without_unfit(recipe: Recipe, asked: Collection[str]) -> Recipe:
    """Return the recipe without options that its net does not have: those of a recipe are for its own net.

    One of the fields that were ``asked`` for stays; to build such a net is refused.
    """
    unfit = set(recipe.model_options()) - set(model_options(recipe.model)) - set(asked)
    return recipe.override(**dict.fromkeys(unfit))


def describe_net(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """Return the name and the constructor arguments of the recipe's net for these images: what a run records."""
    channels, height, width = dataset.shape
    sizes = {"channels": channels, "height": height, "width": width, "classes": len(dataset.classes)}
    return {"name": recipe.model, "arguments": {**sizes, **recipe.model_options()}}


def make_net(described: dict[str, Any], dataset: Dataset, preprocess: Preprocess) -> nn.Module:
    """Build the net that :func:`describe_net` names, and let it take what it wants to from the training images.

    Weights are random, drawn from PyTorch's global generator. Raises UsageError if the net does not fit into memory.
    """
    try:
        net = create_model(described["name"], **described["arguments"])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(f"there is not enough memory for this net {described['name']}; try fewer --filters") from None
    if isinstance(net, ConvNet):
        _, height, width = dataset.shape
        some = dataset.train.spread(max(MILLION // (height * width), 50))
        net.initialise(preprocess.normaliser()(dataset.train.images[some]))
    return net


def freeze(net: nn.Module, recipe: Recipe) -> None:
    """Freeze the recipe's first stages of ``net``; UsageError if it has not so many, or is none that can."""
    if recipe.frozen:
        if not isinstance(net, ConvNet):
            raise UsageError(f"--frozen: the net {recipe.model} is no convlens.models.ConvNet, which it takes")
        net.freeze(recipe.frozen)
