"""Options that several commands share, and the flags of a recipe."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from convlens.errors import UsageError
from convlens.training.recipe import FIELD_TYPES, Recipe, flag, plain_type

DATA_HELP = "digits, mnist, fashion-mnist, cifar10, a folder of class folders, a .npz file, or shards."

Data = Annotated[str, typer.Argument(help=DATA_HELP)]
RunData = Annotated[str | None, typer.Option(help="Location of the run's own data, if they have moved.")]
AllowUnreadable = Annotated[
    bool, typer.Option("--allow-unreadable", help="Skip unreadable files, even if more than 1% of all.")
]
Exclude = Annotated[Path | None, typer.Option(help="File that lists images to leave out, one per line.")]
ImageSize = Annotated[
    int, typer.Option(min=0, help="Side in pixels to which the images of a folder are resized; 0: automatic.")
]
Adapt = Annotated[
    bool,
    typer.Option("--adapt/--no-adapt", help="Bring scans and photos of digits into the form of the training images."),
]


def check_new_file(path: Path | None, flag: str, suffix: str) -> None:
    """Raise UsageError unless ``path``, given with ``flag``, can be created with this suffix, such as "png"."""
    if path is None:
        return
    if path.exists():
        raise UsageError(f"{flag} {path}: that file exists; choose another name")
    if path.suffix.lower() != f".{suffix}":
        raise UsageError(f"{flag} {path}: the name must end in .{suffix}")
    if not path.parent.is_dir():
        raise UsageError(f"{flag} {path}: there is no folder {path.parent}; create it or choose another place")


def with_recipe_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one flag for every field of Recipe; they arrive as its keyword arguments."""
    hints = get_type_hints(command, include_extras=True)
    declared = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [p.replace(annotation=hints[p.name]) for p in declared]
    for item in dataclasses.fields(Recipe):
        if item.name == "name":
            continue
        kind, _ = plain_type(item.name)
        choices = item.metadata["choices"]
        text = item.metadata["help"][0].upper() + item.metadata["help"][1:]
        text += f" ({', '.join(choices)})." if choices else "."
        names = [f"{flag(item.name)}/--no-{flag(item.name)[2:]}"] if kind is bool else [flag(item.name)]
        panel = f"{item.metadata['panel']} (default: the recipe's own)"
        option = typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)
        annotation: Any = Annotated[(FIELD_TYPES[item.name] | None, option)]
        parameters.append(
            inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )

    def call(**values: Any) -> None:
        command(**values)

    call.__doc__, call.__name__ = command.__doc__, command.__name__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def given_overrides(values: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe flags that were given."""
    return {name: value for name, value in values.items() if value is not None}
