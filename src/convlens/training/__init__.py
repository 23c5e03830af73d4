"""Training: recipes, the loop and its callbacks, checkpoints.

The names are imported on first use, because most of them import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convlens.training.callbacks import Callback
    from convlens.training.loop import fit
    from convlens.training.recipe import Recipe
    from convlens.training.recipes import get_recipe
    from convlens.training.state import EpochRecord

_MODULES = {
    "Callback": "callbacks",
    "EpochRecord": "state",
    "Recipe": "recipe",
    "fit": "loop",
    "get_recipe": "recipes",
}

__all__ = ["Callback", "EpochRecord", "Recipe", "fit", "get_recipe"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
