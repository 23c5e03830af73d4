"""``convlens serve``: serve models over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from convlens.system.extras import missing_extra


def serve(
    models: Annotated[
        list[str],
        typer.Argument(help="Run folders, .onnx files, or models by name; NAME=RUN serves one under another name."),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine, requests need a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8000,
) -> None:
    """Serve models over HTTP: a page that runs them in the browser, and an API.

    POST /predict takes an image as its body, or several as the files of a form. The options ?model=, ?top=, ?coverage=
    and ?adapt= choose the model and the content of the response. See also /models, /livez, /readyz, /metrics and
    /openapi.json. With CONVLENS_TOKEN set, or beyond this machine, programs send the token as "Authorization: Bearer
    TOKEN", and browsers ask for it as a password.

    Examples:
      convlens serve mnist

      convlens serve runs/photos-1 pets=runs/photos-2 mnist.onnx --port 8080

      curl -F images=@scan.png localhost:8000/predict
    """
    try:
        from convlens.serving import server
    except ImportError:
        raise missing_extra("serving needs more packages", "serve") from None
    server.serve(models, host, port)
