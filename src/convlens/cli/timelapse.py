"""``convlens timelapse``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convlens.cli.app import app, gc_paused
from convlens.cli.options import check_new_file
from convlens.cli.signals import restore_sigint


@app.command()
def timelapse(
    run: Annotated[str, typer.Argument(help="A run that was trained with --save-snapshots.")],
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
      convlens train mnist --save-snapshots

      convlens timelapse runs/mnist-1 --image scan.png --gif learning.gif
    """
    with gc_paused():
        from convlens.runs.timelapse import write_timelapse_page

    restore_sigint()
    check_new_file(out, "--out", "html")
    check_new_file(gif, "--gif", "gif")
    page, count = write_timelapse_page(run, image, out, gif=gif, data=data, raw=raw)
    print(f"looked back at {count} snapshot{'s' * (count != 1)}")
    for path in (page, gif):
        if path is not None:
            print(f"wrote   {path} ({path.stat().st_size:,} bytes)")
