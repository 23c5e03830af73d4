"""``convlens watch``."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from convlens.cli.app import app


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

    from convlens.serving.dashboard import start_dashboard

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    _, address = start_dashboard(runs, port)
    print(f"watch   {address} (Ctrl-C ends it)", flush=True)
    ended.wait()
