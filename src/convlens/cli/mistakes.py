"""``convlens mistakes``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convlens.cli.app import app, gc_paused
from convlens.cli.signals import restore_sigint


@app.command()
def mistakes(
    run: Annotated[str, typer.Argument(help="A finished run.")],
    to: Annotated[Path | None, typer.Option(help="New folder, instead of RUN/mistakes.")] = None,
    data: Annotated[str | None, typer.Option(help="Where the run's data are, if it does not say.")] = None,
    doubtful: Annotated[int, typer.Option(min=0, help="How many of the least sure right answers to add.")] = 50,
    true: Annotated[str | None, typer.Option(help="Only images of this class.")] = None,
    predicted: Annotated[str | None, typer.Option(help="Only images taken for this class.")] = None,
) -> None:
    """Write the wrong and the most doubtful test images as files: a contact sheet, a CSV, and each as PNG.

    Examples:
      convlens mistakes runs/mnist-1

      convlens mistakes runs/mnist-1 --true 4 --predicted 9 --to fours
    """
    with gc_paused():
        from convlens.runs.mistakes import write_mistakes

    restore_sigint()
    folder, wrong, unsure = write_mistakes(run, to, data=data, doubtful=doubtful, true=true, predicted=predicted)
    print(f"{wrong:,} wrong and {unsure:,} doubtful images in {folder}")
