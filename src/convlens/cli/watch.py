"""``convlens watch``."""

from __future__ import annotations

import signal
from typing import Annotated

import typer


def watch(
    runs: Annotated[
        list[str], typer.Argument(help="Run folders, groups of runs, or folders of runs, finished or in progress.")
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 0,
) -> None:
    """Show runs on a local page that updates itself: curves, speed, remaining time, current mistakes.

    `convlens train --live` shows the same page for its own run. The page is served on this machine only, until Ctrl-C.

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
