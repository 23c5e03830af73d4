"""``convlens export`` and ``verify``: a trained net for other programs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from convlens.cli.app import app, check_new_file


class Target(StrEnum):
    """What a net can be exported to."""

    onnx = "onnx"


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, or a model by name.")],
    format: Annotated[Target, typer.Option(help="What to write.")] = Target.onnx,
    out: Annotated[Path | None, typer.Option(help="New file, instead of NAME.onnx here.")] = None,
) -> None:
    """Write a trained net as one file for other programs, and prove that it answers as the net does.

    An ONNX file takes raw pixels, uint8 (N, H, W, C) of any size, and gives probabilities, label and known. From then
    on `convlens predict` uses it for a run, and starts in half a second.

    Examples:
      convlens export runs/mnist-1

      convlens export mnist --out digits.onnx
    """
    from convlens.shipping.onnx_graph import add_graph, build_onnx, write_onnx
    from convlens.shipping.places import find_bundle, shipped_models

    path = out or Path(f"{Path(model).resolve().name}.{format}")
    check_new_file(path, "--out", format)
    folder = find_bundle(model)
    built = build_onnx(folder)
    drift = write_onnx(built, path)
    if model not in shipped_models():
        add_graph(built, folder)
    print(f"proved  no probability is off by more than {drift:.1g}")
    print(f"wrote   {path} ({path.stat().st_size:,} bytes)")


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A file that `convlens export` wrote.")],
) -> None:
    """Prove once more, on this machine, that an exported file answers as the net did: exit code 1 if it does not.

    Examples:
      convlens verify mnist-1.onnx
    """
    from convlens.shipping.onnx_predictor import OnnxPredictor

    drift = OnnxPredictor.load(file).verify()
    print(f"proved  no probability is off by more than {drift:.1g}")
