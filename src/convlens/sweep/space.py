"""The search space of a sweep: ranges and choices for fields of a recipe, written as ``NAME=VALUES``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convlens.errors import UnknownNameError, UsageError
from convlens.training.recipe import KIND_NAMES, LENGTHS, Recipe, flag, plain_type

if TYPE_CHECKING:
    from optuna import Trial

NO_EFFECT = "it does not change what the model learns"
RANDOM_WEIGHTS = "every trial starts from random weights"
NO_TEST = "no trial uses the test split"
NOT_SEARCHABLE = {  # field -> why
    "name": "it is only a name",
    "seed": "the luckiest of many seeds is not a better recipe; `convlens train --seeds` shows their spread",
    "device": NO_EFFECT,
    "threads": NO_EFFECT,
    "precision": "the machine decides it",
    "grad_accum_steps": "it is for models that do not fit into memory",
    "val_fraction": "all trials are compared on the same validation images",
    "image_size": "all trials are compared on the same images; run one sweep for each size",
    "max_seconds": "how far a training gets in a given time depends on the load of the machine",
    "restore_best": "the best epoch scores higher on validation images than the last one by selection alone",
    "log_test_metrics": NO_TEST,
    "tta": NO_TEST,
    "pretrained": RANDOM_WEIGHTS,
    "freeze": RANDOM_WEIGHTS,
    "sync_batchnorm": "each trial is a single process",
    "save_snapshots": NO_EFFECT,
    "save_every": NO_EFFECT,
    "tensorboard": NO_EFFECT,
}
BOOLEANS = {"yes": True, "no": False, "true": True, "false": False}


@dataclass(frozen=True)
class Range:
    """All numbers from ``low`` to ``high``, both included; ``log`` samples them on a logarithmic scale."""

    low: float
    high: float
    log: bool = False

    def __str__(self) -> str:
        return f"{self.low!r}..{self.high!r}" + ":log" * self.log

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def middle(self) -> float:
        """Return the (geometric, if ``log``) mean of both ends."""
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return round(middle) if isinstance(self.low, int) else middle

    def suggest(self, trial: Trial, name: str) -> float:
        """Return the trial's value of field ``name``."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Choice:
    """One of these values."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return ",".join({True: "yes", False: "no"}[v] if isinstance(v, bool) else str(v) for v in self.values)

    def __contains__(self, value: Any) -> bool:
        return value in self.values

    def suggest(self, trial: Trial, name: str) -> Any:
        """Return the trial's value of field ``name``."""
        return trial.suggest_categorical(name, self.values)


Space = dict[str, Range | Choice]


def display_name(field: str) -> str:
    """Return the name of a recipe field as users write it: ``batch-size``."""
    return field.replace("_", "-")


def parse_space(params: Iterable[str]) -> Space:
    """Return the search space of texts such as ``lr=1e-4..0.1``, ``lr=1e-4..0.1:log`` or ``kernel-size=3,5,7``.

    Raises UsageError for an unknown field, one that should not be searched, and values that the field does not take.
    """
    fields = {item.name for item in dataclasses.fields(Recipe)}
    space: Space = {}
    for text in params:
        name, equals, values = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals:
            raise UsageError(f"write NAME=VALUES, such as lr=1e-4..1e-1:log or kernel-size=3,5, not {text!r}")
        if name not in fields:
            raise UnknownNameError("field to search", display_name(name), map(display_name, fields))
        if name in NOT_SEARCHABLE:
            raise UsageError(f"cannot search `{display_name(name)}`: {NOT_SEARCHABLE[name]}")
        if name in space:
            raise UsageError(f"`{display_name(name)}` is given twice")
        try:
            space[name] = parse_values(name, values.strip())
        except UsageError as error:
            raise UsageError(f"cannot search `{text}`: {error}") from None
    if len(space.keys() & set(LENGTHS)) > 1:
        raise UsageError("search `epochs` or `max-steps`, not both: each is the length of a training")
    return space


def parse_values(name: str, text: str) -> Range | Choice:
    """Parse the range or the choices of one field; UsageError if the field does not take them."""
    kind, _ = plain_type(name)
    low, dots, high = text.partition("..")
    if dots:
        high, colon, scale = high.partition(":")
        if kind not in (int, float):
            raise UsageError(f"{flag(name)} takes {KIND_NAMES[kind]}: list its values with commas")
        if colon and scale != "log":
            raise UsageError(f"a range ends with :log or nothing, not with :{scale}")
        found = Range(parse_value(name, low), parse_value(name, high), bool(colon))
        if not found.low < found.high:
            raise UsageError("a range goes from a smaller number to a larger one")
        if found.log and found.low <= 0:
            raise UsageError("a range with :log starts above 0")
        return found
    values = tuple(parse_value(name, word) for word in text.split(","))
    if len(set(values)) < 2:
        raise UsageError("give at least two different values; a single one is fixed for all trials with its own flag")
    if len(set(values)) < len(values):
        raise UsageError("a value is listed twice")
    return Choice(values)


def parse_value(name: str, text: str) -> Any:
    """Parse one value of a field; UsageError if the field takes it with no values of the other fields."""
    kind, _ = plain_type(name)
    text = text.strip()
    try:
        value = BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise UsageError(f"{flag(name)} takes {KIND_NAMES[kind]}, not {text!r}") from None
    neutral = Recipe(epochs=1, optimizer="sgd", lr_schedule="constant")
    if not (name == "nesterov" and value):  # whether it is valid depends on the momentum
        neutral.override(**{name: value})
    return value
