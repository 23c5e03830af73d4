"""What a sweep refuses before anything runs: values with which no trial could train."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from itertools import product
from typing import Any

from torch import nn

from convlens.data.dataset import Dataset
from convlens.data.preprocess import Preprocess
from convlens.errors import UsageError
from convlens.models import model_options
from convlens.sweep.space import Choice, Range, Space
from convlens.system.random import preserve_rng_state
from convlens.system.text import first_few
from convlens.training.build import drop_unsupported_options, make_model, model_config, require_possible
from convlens.training.recipe import MODEL_OPTIONS, Recipe, flag
from convlens.training.schedule import require_any_size

# fields of which one value may shut out another's; those of one group have nothing to do with the other
BOUND = (
    ("model", *MODEL_OPTIONS, "initial_size", "loss", "label_smoothing", "mixup", "cutmix"),
    ("optimizer", "nesterov", "momentum"),
)

SWITCHES = ("label_smoothing", "mixup", "cutmix")  # all that matters of them is whether they are 0

KEPT = 8  # nets that are kept in memory


class Check:
    """Tries out what trials of a sweep could be: their recipes, and their nets on a few of the images."""

    def __init__(self, base: Recipe, dataset: Dataset):
        self._base = base
        few = dataset.train.select(dataset.train.evenly_spaced(100))
        self._dataset = dataclasses.replace(dataset, train=few)
        self._preprocess = Preprocess.fit(few.images, dataset.input_style)
        self._nets: dict[str, nn.Module] = {}
        self._refused: dict[str, str] = {}

    def require_plan(self, space: Space, overrides: Collection[str]) -> None:
        """Raise UsageError if no trial could train, or none has a net with an option that is given for all.

        What is found to train is what the other checks begin with.
        """
        for names in BOUND:
            self._base = self._find({}, (), names, space)
        for name in set(MODEL_OPTIONS) & set(overrides):
            self._find({}, [name], BOUND[0], space)

    def require_values(self, space: Space) -> None:
        """Raise UsageError for a value with which no trial could train."""
        if not space:
            raise UsageError("nothing is left to search: say what with --param")
        for name, values in space.items():
            for value in probes(name, values):
                typed = value in values.ends if isinstance(values, Range) else True
                try:
                    self.require(name, value, space)
                except UsageError as error:
                    told = Choice((value,)) if typed else values
                    raise UsageError(f"--param {flag(name)[2:]}={told}: {error}") from None

    def fit_preset(self, name: str, values: Range | Choice, space: Space, notes: list[str]) -> Range | Choice | None:
        """Return what of a preset's ``values`` the nets of ``space`` can take, and note what they cannot."""
        if name not in MODEL_OPTIONS or not isinstance(values, Choice):
            return values
        word = flag(name)[2:]
        searched = space.get("model")
        nets: list[Any] = list(searched.values) if isinstance(searched, Choice) else [self._base.model]
        if not any(name in model_options(net) for net in nets):
            notes.append(f"{word} is left out: it is no option of the net {' or '.join(nets)}")
            return None
        fitting = []
        for value in values.values:
            try:
                self.require(name, value, space)
                fitting.append(value)
            except UsageError as error:
                notes.append(f"{word} {value} is left out: {error}")
        if len(fitting) == 1:
            notes.append(f"{word} is not searched: of its values only {fitting[0]} is left")
        return Choice(tuple(fitting)) if len(fitting) > 1 else None

    def require(self, name: str, value: Any, space: Space) -> None:
        """Raise UsageError unless some trial with this value could train; its net must have an option that it is of."""
        names = next((names for names in BOUND if name in names), ())
        self._find({name: value}, [name], names, space)

    def _find(self, values: Mapping[str, Any], asked: Collection[str], names: Collection[str], space: Space) -> Recipe:
        """Return a recipe with ``values`` that can train, with other values of the fields ``names`` that are searched.

        Its net must have what was ``asked`` for. Raises UsageError with the first reasons if there is none.
        """
        others = {n: examples(n, space[n], self._base) for n in names if n in space and n not in values}
        reasons: dict[str, None] = {}  # in the order in which they were found
        for chosen in product(*others.values()):
            try:
                drawn = self._base.override(**dict(zip(others, chosen, strict=True)), **values)
                recipe = drop_unsupported_options(drawn, asked)
                net = self._net(recipe)
                require_any_size(net, self._dataset.shape, recipe)
                require_possible(recipe, net, self._dataset)
                return drawn
            except UsageError as error:
                reasons[str(error)] = None
        raise UsageError(first_few(list(reasons), 2, "; "))

    def _net(self, recipe: Recipe) -> nn.Module:
        """Return the recipe's net; UsageError if it does not fit these images, or cannot be built at all."""
        described = model_config(recipe, self._dataset)
        key = json.dumps(described)
        if key in self._refused:
            raise UsageError(self._refused[key])
        if key not in self._nets:
            if len(self._nets) >= KEPT:
                self._nets.clear()
            try:
                with preserve_rng_state():
                    self._nets[key] = make_model(described, self._dataset, self._preprocess)
            except Exception as error:  # a net of the user's own may raise anything
                reason = str(error).split("\n", 1)[0]
                if not isinstance(error, UsageError):
                    reason = f"the net {recipe.model} cannot be built: {reason}"
                self._refused[key] = reason
                raise UsageError(reason) from None
        return self._nets[key]


def probes(name: str, values: Range | Choice) -> tuple[Any, ...]:
    """Return the values to try out: all choices; of a range one inside, or both ends of what shapes a net."""
    if isinstance(values, Choice):
        return values.values
    # the end of another range may be shut out, as momentum 0 is by --nesterov, where what is drawn never is
    return values.ends if name in MODEL_OPTIONS else (values.inside(),)


def examples(name: str, values: Range | Choice, base: Recipe) -> tuple[Any, ...]:
    """Return values that trials may have, the base recipe's own first; of a range that are a few."""
    own = getattr(base, name)
    if isinstance(values, Range) and name not in MODEL_OPTIONS:
        return (values.inside(),)
    found = values.values if isinstance(values, Choice) else (values.low, values.inside(), values.high)
    if name in SWITCHES:  # one of each kind
        found = tuple({bool(value): value for value in found}.values())
    return tuple(dict.fromkeys([own, *found])) if own is not None and own in values else found
