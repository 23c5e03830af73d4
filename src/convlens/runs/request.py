"""What the user asked to train."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convlens.errors import UsageError
from convlens.training.recipe import LENGTHS, Recipe


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Everything that a call of :func:`convlens.train` or a command line asks for.

    Raises:
        UsageError: ``recipe`` is neither a name nor a Recipe, or options contradict each other.
    """

    data: Any  # whatever convlens.load_dataset takes
    recipe: str | Recipe | None = None  # None: the default recipe of the data
    overrides: Mapping[str, Any] = field(default_factory=dict)  # recipe fields
    out: str | Path | None = None  # new folder; None: the next free runs/<data>-<n>
    init_from: str | Path | None = None  # run or model to fine-tune
    budget: float | str | None = None  # seconds, or text such as "5m"
    exclude: str | Path | None = None  # file that lists images to leave out
    allow_unreadable: bool = False
    started: float = field(default_factory=time.perf_counter)  # the budget counts from here

    def __post_init__(self) -> None:
        if not isinstance(self.recipe, str | Recipe | None):
            kind = type(self.recipe).__name__
            raise UsageError(f"a recipe is a name or a Recipe, not a {kind}; pass arrays as one tuple (x, y)")
        if self.budget is not None and any(self.overrides.get(name) is not None for name in LENGTHS):
            raise UsageError("`budget` sets the length; leave out `epochs`, `max_steps` and `max_seconds`")

    @classmethod
    def create(cls, data: Any, recipe: str | Recipe | None = None, **options: Any) -> TrainRequest:
        """Build a request from keyword options: fields of the request, all others overrides of the recipe."""
        own = {item.name for item in dataclasses.fields(cls)} - {"data", "recipe", "overrides"}
        fields = {name: value for name, value in options.items() if name in own}
        overrides = {name: value for name, value in options.items() if name not in own}
        return cls(data=data, recipe=recipe, overrides=overrides, **fields)
