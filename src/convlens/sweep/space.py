"""What a sweep searches: ranges and choices for the fields of a recipe, as ``--param`` says them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convlens.errors import UnknownNameError, UsageError
from convlens.training.recipe import KIND_NAMES, LENGTHS, Recipe, flag, plain_type

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

PRESETS = {  # classic: what the classic programs 003 and 004 suggest to change
    "classic": ("batch-size=64,128,256", "kernel-size=3,5,7", "lr=1e-4..1e-1:log", "momentum=0..0.99"),
}
UNTOLD = "it changes nothing that is learned"
NOT_SEARCHED = {  # field -> why
    "name": "it is only a name",
    "seed": "the luckiest of many seeds is no better recipe; `convlens train --seeds` shows their spread",
    "device": UNTOLD,
    "threads": UNTOLD,
    "precision": "the machine decides it",
    "grad_accum_steps": "it is for nets that do not fit into memory",
    "val_fraction": "all trials are compared on the same validation images",
    "image_size": "all trials are compared on the same images; make a sweep for each size",
    "max_seconds": "how far a training comes in a time depends on what else the machine does",
    "restore_best": "the best epoch looks better on validation images than the last one, whatever it is worth",
    "log_test_metrics": "no trial looks at the test split",
    "tta": "no trial looks at the test split",
    "pretrained": "all nets start from random weights",
    "freeze": "all nets start from random weights",
    "sync_batchnorm": "each training of a sweep is one process",
    "save_snapshots": UNTOLD,
    "save_every": UNTOLD,
    "tensorboard": UNTOLD,
}
WORDS = {"yes": True, "no": False, "true": True, "false": False}


@dataclass(frozen=True)
class Range:
    """All numbers from ``low`` to ``high``, both included; ``log``: small ones as often as large ones."""

    low: float
    high: float
    log: bool = False

    def __str__(self) -> str:
        return f"{self.low!r}..{self.high!r}" + ":log" * self.log

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends."""
        return self.low, self.high

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def inside(self) -> float:
        """Return a value between the ends."""
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return round(middle) if isinstance(self.low, int) else middle

    def distribution(self) -> BaseDistribution:
        """Return it as Optuna has it."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Choice:
    """One of these values."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return ",".join({True: "yes", False: "no"}[v] if isinstance(v, bool) else str(v) for v in self.values)

    def __contains__(self, value: Any) -> bool:
        return value in self.values

    def distribution(self) -> BaseDistribution:
        """Return it as Optuna has it."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)


Space = dict[str, Range | Choice]


def parse_space(params: Iterable[str]) -> Space:
    """Return what ``--param NAME=VALUES`` says, field by field: ``1e-4..0.1``, ``1e-4..0.1:log``, ``3,5,7``.

    Raises UsageError for an unknown name (with the nearest one), a field that makes no sense to search, and values that
    the field does not take.
    """
    fields = {item.name for item in dataclasses.fields(Recipe)}
    space: Space = {}
    for text in params:
        name, equals, values = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals:
            raise UsageError(f"--param takes NAME=VALUES, such as lr=1e-4..1e-1:log or kernel-size=3,5, not {text!r}")
        if name not in fields:
            raise UnknownNameError("name of a --param", flag(name)[2:], [flag(field)[2:] for field in fields])
        if name in NOT_SEARCHED:
            raise UsageError(f"--param {flag(name)[2:]} makes no sense to search: {NOT_SEARCHED[name]}")
        if name in space:
            raise UsageError(f"--param {flag(name)[2:]} is given twice")
        try:
            space[name] = parse_values(name, values.strip())
        except UsageError as error:
            raise UsageError(f"--param {text}: {error}") from None
    if len([name for name in LENGTHS if name in space]) > 1:
        raise UsageError("--param epochs or --param max_steps, not both: each is the length of a training")
    return space


def parse_values(name: str, text: str) -> Range | Choice:
    """Return the range or the choices that ``text`` says for a field."""
    kind, _ = plain_type(name)
    low, dots, high = text.partition("..")
    if dots:
        high, colon, scale = high.partition(":")
        if kind not in (int, float):
            raise UsageError(f"{flag(name)} takes {KIND_NAMES[kind]}: name its values with commas")
        if colon and scale != "log":
            raise UsageError(f"a range ends in :log or in nothing, not in :{scale}")
        found = Range(parse_value(name, low), parse_value(name, high), bool(colon))
        if not found.low < found.high:
            raise UsageError("a range goes from a smaller number to a larger one")
        if found.log and found.low <= 0:
            raise UsageError("a range with :log begins above 0")
        return found
    values = tuple(parse_value(name, word) for word in text.split(","))
    if len(set(values)) < 2:
        raise UsageError(f"give two different values or more; one is fixed for all trials with {flag(name)}")
    if len(set(values)) < len(values):
        raise UsageError("a value is named twice")
    return Choice(values)


def parse_value(name: str, text: str) -> Any:
    """Return one value of a field; UsageError if the field does not take it, whatever the others are."""
    kind, _ = plain_type(name)
    text = text.strip()
    try:
        value = WORDS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise UsageError(f"{flag(name)} takes {KIND_NAMES[kind]}, not {text!r}") from None
    neutral = Recipe(epochs=1, optimizer="sgd", lr_schedule="constant")
    if not (name == "nesterov" and value):  # that is no matter of its own
        neutral.override(**{name: value})
    return value


def space_texts(space: Mapping[str, Range | Choice]) -> dict[str, str]:
    """Return the space as text, for a file; :func:`read_space` reads it."""
    return {name: str(values) for name, values in space.items()}


def read_space(texts: Mapping[str, str]) -> Space:
    """Return the space that :func:`space_texts` wrote."""
    return parse_space(f"{name}={text}" for name, text in texts.items())
