"""``convlens export`` and ``verify``: a trained net for other programs."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from convlens.cli.app import app, check_new_file
from convlens.errors import ConvlensError

MOST = 20  # sample pictures on a page


class Target(StrEnum):
    """What a net can be exported to."""

    onnx = "onnx"
    html = "html"


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, or a model by name.")],
    format: Annotated[Target, typer.Option(help="What to write.")] = Target.onnx,
    out: Annotated[Path | None, typer.Option(help="New file, instead of NAME.onnx or NAME.html here.")] = None,
    samples: Annotated[
        bool, typer.Option("--samples/--no-samples", help="Put a test image of each class on the html page.")
    ] = True,
) -> None:
    """Write a trained net as one file: ONNX for other programs, or a web page that runs it and shows how it decides.

    An ONNX file takes raw pixels, uint8 (N, H, W, C) of any size, and gives probabilities, label and known; it is
    proved to answer as the net does. From then on `convlens predict` uses it for a run, and starts in half a second.
    The page needs no network and no server, and checks itself when it is opened.

    Examples:
      convlens export runs/mnist-1

      convlens export mnist --format html --out digits.html
    """
    from convlens.shipping.onnx_graph import add_graph, build_onnx, write_onnx
    from convlens.shipping.places import find_bundle, shipped_models

    path = out or Path(f"{Path(model).resolve().name}.{format}")
    check_new_file(path, "--out", format)
    folder = find_bundle(model)
    if format is Target.html:
        from convlens.shipping.twin import write_page

        write_page(folder, path, find_samples(model) if samples else [])
    else:
        built = build_onnx(folder)
        drift = write_onnx(built, path)
        if model not in shipped_models():
            try:
                add_graph(built, folder)
            except ConvlensError as error:  # the run may not be ours to write to
                print(f"convlens: `predict` stays as it is: {error}", file=sys.stderr)
        print(f"proved  no probability is off by more than {drift:.1g}")
    print(f"wrote   {path} ({path.stat().st_size:,} bytes)")


def find_samples(model: str) -> list[Any]:
    """Return (class, image) of a test image of each class, if the data of a run are still there."""
    from convlens.run import load_tested
    from convlens.runfolder import RunFolder

    if not RunFolder(Path(model)).test.is_file():
        return []  # a model that came from elsewhere
    try:
        _, dataset = load_tested(model)
    except ConvlensError as error:
        print(f"convlens: no sample pictures on the page: {error}", file=sys.stderr)
        return []
    labels = dataset.test.labels.tolist()
    rows = [labels.index(label) for label in sorted(set(labels))[:MOST]]
    print(f"samples {len(rows)} test images, one of a class; --no-samples leaves them out")
    return [(dataset.classes[labels[row]], dataset.test.images[row].numpy()) for row in rows]


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
