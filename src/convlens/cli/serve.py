"""``convlens serve``: a trained net behind HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from convlens.errors import UsageError


def serve(
    models: Annotated[
        list[str], typer.Argument(help="Run folders, .onnx files, or models by name; NAME=RUN gives one another name.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; any but this machine's own asks for a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: one that is free.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes that answer.")] = 1,
) -> None:
    """Serve trained nets: a page that shows them at work, and an HTTP interface for programs.

    POST /predict takes a picture as its body, or several as files of a form; ?model=, ?top=, ?coverage= and ?adapt=
    choose what is answered, and without them the first model answers with its best guess. /models, /live, /ready,
    /metrics and /openapi.json tell the rest. With CONVLENS_TOKEN set, or beyond this machine, a program sends the
    token as "Authorization: Bearer TOKEN", and a browser asks for it as a password.

    Examples:
      convlens serve mnist

      convlens serve runs/photos-1 pets=runs/photos-2 mnist.onnx --port 8080

      curl -F images=@scan.png localhost:8000/predict
    """
    try:
        from convlens.serving import server
    except ImportError:
        raise UsageError("serving needs a few packages more: pip install 'convlens[serve]'") from None
    server.serve(models, host, port, workers)
