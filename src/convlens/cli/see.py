"""``convlens explain``, ``timelapse`` and ``watch``: what a net sees, how it came to, and how it learns just now."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from convlens.cli.app import app, check_new_file, heed_interrupts, importing
from convlens.cli.use import expand
from convlens.errors import UsageError


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, or a model by name.")],
    images: Annotated[
        list[str], typer.Argument(help="Files, folders, globs, 50 pictures at most; - reads a list of files.")
    ],
    out: Annotated[Path | None, typer.Option(help="New folder, instead of explained/MODEL-N.")] = None,
    label: Annotated[str | None, typer.Option(help="Class to look for, instead of the predicted one.")] = None,
    unit: Annotated[
        str | None,
        typer.Option(help="STAGE:CHANNEL,ROW,COLUMN, counted from 0: a unit to look at, not the loudest."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Where the training images are, if the run does not say.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Only resize; do not look for ink on paper.")] = False,
) -> None:
    """Show why a net says what it says: where it looks, what each stage makes of it, what it was reminded of.

    Examples:
      convlens explain runs/mnist-1 scan.png

      convlens explain mnist scan.png --label 1 --unit conv2:5,1,1

      convlens explain runs/photos-1 holiday/*.jpg --out holiday-explained
    """
    with importing():
        from convlens.runs.explain import MOST, explain_pictures

    heed_interrupts()
    place = None if unit is None else read_unit(unit)
    files = expand(images)
    if len(files) > MOST:
        print(f"convlens: {len(files)} pictures; the first {MOST} are explained, which fill a page", file=sys.stderr)
        files = files[:MOST]
    folder, explanations, missing = explain_pictures(model, files, out, data=data, raw=raw, label=label, unit=place)
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


@app.command()
def timelapse(
    run: Annotated[str, typer.Argument(help="A run that was trained with --snapshots.")],
    image: Annotated[str | None, typer.Option(help="A picture to follow, instead of an image held out.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="New .html file, instead of RUN/timelapse.html, which is made anew.")
    ] = None,
    gif: Annotated[Path | None, typer.Option(help="Also write an animated picture: a new .gif file.")] = None,
    data: Annotated[str | None, typer.Option(help="Where the run's data are, if it does not say.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Only resize; do not look for ink on paper.")] = False,
) -> None:
    """Show how a net learned: a page with a slider over its training, with filters, feature maps, verdict, mistakes.

    Examples:
      convlens train mnist --snapshots

      convlens timelapse runs/mnist-1 --image scan.png --gif learning.gif
    """
    with importing():
        from convlens.runs.timelapse import show_training

    heed_interrupts()
    check_new_file(out, "--out", "html")
    check_new_file(gif, "--gif", "gif")
    page, count = show_training(run, image, out, gif=gif, data=data, raw=raw)
    print(f"looked back at {count} snapshot{'s' * (count != 1)}")
    for path in (page, gif):
        if path is not None:
            print(f"wrote   {path} ({path.stat().st_size:,} bytes)")


@app.command()
def watch(
    runs: Annotated[
        list[str], typer.Argument(help="Run folders, series of them, or folders of runs, finished or under way.")
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: one that is free.")] = 0,
) -> None:
    """Show runs on a local page that follows them: curves, pace, time left, current mistakes, side by side.

    `convlens train --live` shows the same page of its own run. It is for this machine only. Ctrl-C ends it.

    Examples:
      convlens watch runs/mnist-1

      convlens watch runs/mnist-1 runs/mnist-2 runs/mnist-seeds-1
    """
    import threading

    from convlens.serving.dashboard import start_watching

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    _, address = start_watching(runs, port)
    print(f"watch   {address} (Ctrl-C ends it)", flush=True)
    ended.wait()
