"""``convlens recipes``."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from typing import Annotated

import typer

from convlens.cli.output import first_line, print_table


def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to show in full.")] = None,
) -> None:
    """List the recipes, or show one as JSON.

    Examples:
      convlens recipes

      convlens recipes mnist-4conv
    """
    from convlens.training.recipes import RECIPES, get_recipe

    if name is not None:
        print(inspect.getdoc(RECIPES[name]), file=sys.stderr)
        print(json.dumps(dataclasses.asdict(get_recipe(name)), indent=2))
        return
    print_table([(recipe, first_line(RECIPES[recipe])) for recipe in RECIPES.names()], head=False)
