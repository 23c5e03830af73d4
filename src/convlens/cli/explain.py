"""``convlens explain``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from convlens.cli.options import Adapt, RunData
from convlens.cli.predict import expand
from convlens.cli.signals import restore_sigint
from convlens.cli.startup import gc_paused
from convlens.errors import UsageError


def explain(
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, or a model by name.")],
    images: Annotated[list[str], typer.Argument(help="Files, folders or globs, at most 50 images; - reads a list.")],
    out: Annotated[Path | None, typer.Option(help="New folder (default: explained/MODEL-N).")] = None,
    label: Annotated[str | None, typer.Option(help="Class to explain, instead of the predicted one.")] = None,
    unit: Annotated[
        str | None,
        typer.Option(help="Unit to show, as STAGE:CHANNEL,ROW,COLUMN from 0, instead of the most active one."),
    ] = None,
    data: RunData = None,
    adapt: Adapt = True,
) -> None:
    """Explain predictions on a page: occlusion maps, activation maps, feature maps, similar training images.

    Examples:
      convlens explain runs/mnist-1 scan.png

      convlens explain mnist scan.png --label 1 --unit conv2:5,1,1

      convlens explain runs/photos-1 holiday/*.jpg --out holiday-explained
    """
    with gc_paused():
        from convlens.runs.explain import MAX_IMAGES, explain_images

    restore_sigint()
    place = None if unit is None else read_unit(unit)
    files = expand(images)
    if len(files) > MAX_IMAGES:
        print(f"convlens: {len(files)} images; only the first {MAX_IMAGES} are explained", file=sys.stderr)
        files = files[:MAX_IMAGES]
    folder, explanations, missing = explain_images(model, files, out, data=data, adapt=adapt, label=label, unit=place)
    for file, explanation in zip(files, explanations, strict=True):
        print(f"{file}: {explanation.prediction}")
    if missing:
        print(f"convlens: no training images to compare with: {missing}", file=sys.stderr)
    print(f"wrote   {folder / 'index.html'}")


def read_unit(text: str) -> tuple[str, int, int, int]:
    """Return the parts of STAGE:CHANNEL,ROW,COLUMN."""
    try:
        stage, place = text.rsplit(":", 1)
        channel, row, column = (int(part) for part in place.split(","))
    except ValueError:
        raise UsageError(f"--unit {text!r} is not STAGE:CHANNEL,ROW,COLUMN, such as conv1:5,3,3") from None
    return stage, channel, row, column
