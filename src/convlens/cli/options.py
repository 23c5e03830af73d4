"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convlens.errors import UsageError

# arguments of several verbs
DATA_HELP = "digits, mnist, fashion-mnist, cifar10, a folder of class folders, or a .npz file."

Data = Annotated[str, typer.Argument(help=DATA_HELP)]

AllowUnreadable = Annotated[bool, typer.Option("--allow-unreadable", help="Skip unreadable files, however many.")]

Exclude = Annotated[Path | None, typer.Option(help="Leave out the images that this file names.")]


def check_new_file(path: Path | None, flag: str, suffix: str) -> None:
    """Raise UsageError if ``path``, given with ``flag``, is no name for a new file of this kind, such as "png"."""
    if path is None:
        return
    if path.exists():
        raise UsageError(f"{flag} {path}: that file exists; choose another name")
    if path.suffix.lower() != f".{suffix}":
        raise UsageError(f"{flag} {path}: the name must end in .{suffix}")
    if not path.parent.is_dir():
        raise UsageError(f"{flag} {path}: there is no folder {path.parent}; make it, or choose another place")
