"""``convlens timelapse``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convlens.cli.options import Adapt, RunData, check_new_file
from convlens.cli.signals import restore_sigint
from convlens.cli.startup import gc_paused


def timelapse(
    run: Annotated[str, typer.Argument(help="A run that was trained with --save-snapshots.")],
    image: Annotated[str | None, typer.Option(help="Image to follow, instead of a validation image.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="New .html file (default: RUN/timelapse.html, which is replaced).")
    ] = None,
    gif: Annotated[Path | None, typer.Option(help="New .gif file for an animation.")] = None,
    data: RunData = None,
    adapt: Adapt = True,
) -> None:
    """Show how a model learned: a page with a slider over its training.

    Examples:
      convlens train mnist --save-snapshots

      convlens timelapse runs/mnist-1 --image scan.png --gif learning.gif
    """
    check_new_file(out, "--out", "html")
    check_new_file(gif, "--gif", "gif")
    with gc_paused():
        from convlens.runs.timelapse import write_timelapse_page

    restore_sigint()
    page, count = write_timelapse_page(run, image, out, gif=gif, data=data, adapt=adapt)
    print(f"replayed {count} snapshot{'s' * (count != 1)}")
    for path in (page, gif):
        if path is not None:
            print(f"wrote   {path} ({path.stat().st_size:,} bytes)")
