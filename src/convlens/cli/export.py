"""``convlens export``."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from convlens.cli.app import app
from convlens.cli.options import check_new_file
from convlens.cli.signals import exit_on_sigint, restore_sigint
from convlens.errors import ConvlensError, UsageError

MOST = 20  # sample pictures on a page


class Target(StrEnum):
    """What a net can be exported to."""

    onnx = "onnx"
    html = "html"


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="A run folder, a model folder, or a model by name; for html also a .onnx file.")
    ],
    format: Annotated[Target, typer.Option(help="What to write.")] = Target.onnx,
    out: Annotated[Path | None, typer.Option(help="New file, instead of NAME.onnx or NAME.html here.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Where the data are, for --int8 and samples, if the run does not say.")
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="ONNX in 8 bits: smaller, and faster if it is large; needs the run's data.")
    ] = False,
    samples: Annotated[
        bool, typer.Option("--samples/--no-samples", help="Put a test image of each class on the html page.")
    ] = True,
) -> None:
    """Write a trained net as one file: ONNX for other programs, or a web page that runs it and shows how it decides.

    An ONNX file takes raw pixels, uint8 (N, H, W, C) of any size, and gives probabilities, label and in_distribution;
    it is proved to answer as the net does. From then on `convlens predict` uses it for a run, and starts in half a
    second. The page needs no network and no server, and checks itself when it is opened.

    Examples:
      convlens export runs/mnist-1

      convlens export runs/mnist-1 --int8

      convlens export mnist --format html --out digits.html
    """
    if int8 and format is Target.html:
        raise UsageError("--int8 is for ONNX files; the page has its own small numbers")
    if data is not None and not (int8 or (format is Target.html and samples)):
        raise UsageError("--data is for --int8, and for the pictures on the html page; this file needs none")
    if not samples and format is Target.onnx:
        raise UsageError("--no-samples is for --format html; an ONNX file has no pictures")
    name = Path(model).resolve().name.removesuffix(".onnx") + ("-int8" if int8 else "")
    path = out or Path(f"{name}.{format}")
    if out is None and path.exists():
        raise UsageError(f"{path} exists; name another file with --out")
    check_new_file(path, "--out", format)
    if format is Target.html:
        write_page(model, path, data, samples=samples)
    elif int8:
        write_int8(model, path, data)
    else:
        write_onnx_file(model, path)
    print(f"wrote   {path} ({path.stat().st_size:,} bytes)")


def write_page(model: str, path: Path, data: str | None, *, samples: bool) -> None:
    """Write the page of a net."""
    from convlens.export.html import render_playground
    from convlens.export.load import load_onnx
    from convlens.system.files import write_text

    shown = find_samples(model, data) if samples else []
    exit_on_sigint()  # the exporter would take it for a fault of the net
    page = render_playground(load_onnx(model), shown)
    restore_sigint()
    write_text(path, page)


def write_onnx_file(model: str, path: Path) -> None:
    """Write the ONNX file of a net, and add the graph to its run, so that `convlens predict` finds it there."""
    from convlens.export.onnx import add_graph, build_onnx, write_onnx
    from convlens.inference.store import bundled_models, resolve_bundle

    folder = resolve_bundle(model)
    print_export_notice()
    built = build_onnx(folder)
    restore_sigint()  # the exporter would have taken it for a fault of the net
    drift = write_onnx(built, path)
    if model not in bundled_models():
        try:
            add_graph(built, folder)
        except ConvlensError as error:  # the run may not be ours to write to
            print(f"convlens: `predict` stays as it is: {error}", file=sys.stderr)
    print(f"proved  no probability is off by more than {drift:.1g} from what the net gives in PyTorch")


def write_int8(model: str, path: Path, data: str | None) -> None:
    """Write the ONNX file of a net in 8 bits, and say what they cost; the run itself keeps its exact graph."""
    from convlens.export.onnx import require_exporter, write_onnx
    from convlens.export.quantize import build_int8
    from convlens.inference.store import resolve_bundle
    from convlens.runs.evaluate import load_evaluation_data

    restore_sigint()
    require_exporter()
    folder = resolve_bundle(model)
    try:
        _, dataset = load_evaluation_data(model, data, other=True)
    except ConvlensError as error:
        raise UsageError(f"--int8 needs the images that the net was trained on: {error}") from None
    print_export_notice()
    exit_on_sigint()
    built, _, cost = build_int8(folder, dataset)
    restore_sigint()
    write_onnx(built, path)
    print(f"8 bits  {cost}")


def print_export_notice() -> None:
    """Say on a terminal what takes so long: PyTorch's exporter tells nobody how far it is."""
    if sys.stderr.isatty():
        print("PyTorch traces the net: 5 to 10 seconds ...", file=sys.stderr)


def find_samples(model: str, data: str | None) -> list[Any]:
    """Return (class, image) of a test image of each class, if the data of a run are still there, or of ``data``."""
    from convlens.run_dir import RunDir
    from convlens.runs.evaluate import load_evaluation_data

    restore_sigint()
    if data is None and not RunDir(Path(model)).test.is_file():
        return []  # a model that came from elsewhere
    try:
        _, dataset = load_evaluation_data(model, data, other=True)
    except ConvlensError as error:
        if data is not None:
            raise
        print(f"convlens: no sample pictures on the page: {error}", file=sys.stderr)
        return []
    labels = dataset.test.labels.tolist()
    rows = [labels.index(label) for label in sorted(set(labels))[:MOST]]
    print(f"samples {len(rows)} test images, one of a class; --no-samples leaves them out")
    return [(dataset.classes[labels[row]], dataset.test.images[row].numpy()) for row in rows]
