"""What a sweep refuses before anything runs: values with which no trial could train."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from itertools import product
from typing import Any

from torch import nn

from convlens.data.dataset import Dataset
from convlens.data.preprocess import Preprocess
from convlens.errors import UsageError, first_few
from convlens.models import model_options
from convlens.runtime import callers_state_kept
from convlens.sweep.space import Choice, Range, Space
from convlens.training.engine import require_possible
from convlens.training.nets import describe_net, make_net, without_unfit
from convlens.training.recipe import MODEL_OPTIONS, Recipe, flag

# fields of which one value may shut out another's
BOUND = (
    "model", *MODEL_OPTIONS, "loss", "label_smoothing", "mixup", "cutmix", "optimizer", "nesterov", "momentum",
)  # fmt: skip


class Check:
    """Tries out what trials of a sweep could be: their recipes, and their nets on a few of the images."""

    def __init__(self, base: Recipe, dataset: Dataset):
        self._base, self._dataset = base, dataset
        self._preprocess = Preprocess.measure(dataset.train.images[:100], dataset.style)
        self._nets: dict[str, nn.Module | UsageError] = {}

    def base(self, space: Space, overrides: Collection[str]) -> None:
        """Raise UsageError if no trial could train, or none has a net with an option that is given for all."""
        self.require({}, (), space)
        for name in MODEL_OPTIONS:
            if name in overrides:
                self.require({}, [name], space)

    def space(self, space: Space) -> None:
        """Raise UsageError for a value with which no trial could train."""
        if not space:
            raise UsageError("nothing is left to search: say what with --param")
        for name, values in space.items():
            for value in probes(name, values):
                try:
                    self.require({name: value}, [name], space)
                except UsageError as error:
                    raise UsageError(f"--param {flag(name)[2:]}={value}: {error}") from None

    def fitting(self, name: str, values: Range | Choice, space: Space, notes: list[str]) -> Range | Choice | None:
        """Return what of a preset's ``values`` the nets of ``space`` can take, and note what they cannot."""
        if name not in MODEL_OPTIONS or not isinstance(values, Choice):
            return values
        nets: list[str] = list(space["model"].tried) if "model" in space else [self._base.model]  # type: ignore[arg-type]
        told = f"the net {' or '.join(nets)}"
        if not any(name in model_options(net) for net in nets):
            notes.append(f"{told} has no {name}: it is left out")
            return None
        fitting = []
        for value in values.values:
            try:
                self.require({name: value}, [name], space)
                fitting.append(value)
            except UsageError:
                notes.append(f"{name} {value} does not fit {told} and these images: it is left out")
        return Choice(tuple(fitting)) if len(fitting) > 1 else None

    def require(self, values: Mapping[str, Any], asked: Collection[str], space: Space) -> None:
        """Raise UsageError unless some trial with ``values`` could train; its net must have what was ``asked`` for."""
        others = {name: examples(space[name]) for name in BOUND if name in space and name not in values}
        reasons: dict[str, None] = {}  # in the order in which they were found
        for chosen in product(*others.values()):
            try:
                recipe = self._base.override(**dict(zip(others, chosen, strict=True)), **values)
                recipe = without_unfit(recipe, asked)
                require_possible(recipe, self._net(recipe), self._dataset)
                return
            except UsageError as error:
                reasons[str(error)] = None
        raise UsageError(first_few(list(reasons), 2, "; "))

    def _net(self, recipe: Recipe) -> nn.Module:
        """Return the recipe's net, which is built once; UsageError if it does not fit these images."""
        described = describe_net(recipe, self._dataset)
        key = json.dumps(described)
        if key not in self._nets:
            try:
                with callers_state_kept():
                    self._nets[key] = make_net(described, self._dataset, self._preprocess)
            except UsageError as error:
                self._nets[key] = error
        found = self._nets[key]
        if isinstance(found, UsageError):
            raise found
        return found


def probes(name: str, values: Range | Choice) -> tuple[Any, ...]:
    """Return the values to try out of a field: all choices; of a range one, but both ends of what shapes a net."""
    # the end of another range may be shut out, as momentum 0 is by --nesterov, where what is drawn never is
    return values.tried if name in MODEL_OPTIONS else examples(values)


def examples(values: Range | Choice) -> tuple[Any, ...]:
    """Return values that trials draw: all choices, or one inside a range."""
    return values.values if isinstance(values, Choice) else (values.inside(),)
