"""``convlens mistakes``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convlens.cli.options import RunData
from convlens.cli.signals import restore_sigint
from convlens.cli.startup import gc_paused


def mistakes(
    run: Annotated[str, typer.Argument(help="A finished run.")],
    out: Annotated[Path | None, typer.Option(help="New folder (default: RUN/mistakes).")] = None,
    data: RunData = None,
    uncertain: Annotated[
        int, typer.Option(min=0, help="Number of correct predictions to add, the least confident first.")
    ] = 50,
    true: Annotated[str | None, typer.Option(help="Only images of this class.")] = None,
    predicted: Annotated[str | None, typer.Option(help="Only images predicted as this class.")] = None,
) -> None:
    """Write the misclassified and the most uncertain test images as PNG files, an image grid and a CSV.

    Examples:
      convlens mistakes runs/mnist-1

      convlens mistakes runs/mnist-1 --true 4 --predicted 9 --out fours
    """
    with gc_paused():
        from convlens.runs.mistakes import write_mistakes

    restore_sigint()
    folder, wrong, unsure = write_mistakes(run, out, data=data, uncertain=uncertain, true=true, predicted=predicted)
    print(f"{wrong:,} misclassified and {unsure:,} uncertain images in {folder}")
