"""``convlens predict``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from convlens.cli.options import Adapt
from convlens.cli.output import Format, PredictionPrinter
from convlens.cli.startup import gc_paused
from convlens.errors import ConvlensError, UsageError

BATCH_IMAGES = 256


def predict(
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, a .onnx file, or a model by name.")],
    images: Annotated[list[str], typer.Argument(help="Files, folders or globs; - reads a list of files.")],
    top: Annotated[int, typer.Option(min=1, help="Number of classes to print as text.")] = 1,
    format: Annotated[Format, typer.Option(help="Output format.")] = Format.text,
    adapt: Adapt = True,
    coverage: Annotated[
        float | None,
        typer.Option(help="Also return a prediction set that contains the true class at this rate, such as 0.95."),
    ] = None,
) -> None:
    """Classify images; those unlike the training images are reported as unknown.

    Examples:
      convlens predict mnist scan.png --top 3

      convlens predict runs/photos-1 holiday/ --format csv

      convlens predict mnist scan.png --coverage 0.95

      find . -name '*.jpg' | convlens predict runs/photos-1 -
    """
    with gc_paused():
        from convlens.data.images import InvalidImageError, open_image
        from convlens.evaluation.conformal import require_coverage
        from convlens.inference.onnx_runtime import load_predictor

    predictor = load_predictor(model)
    if coverage is not None:
        require_coverage(coverage, predictor.conformal_thresholds)
    files = expand(images)
    batch: list[tuple[str, Any]] = []
    bad, printer = 0, PredictionPrinter(format, predictor.classes, top)
    for number, file in enumerate(files, start=1):
        try:
            batch.append((file, predictor.preprocess.transform(open_image(file), adapt=adapt)))
        except InvalidImageError as error:
            bad += 1
            print(f"convlens: {error}", file=sys.stderr)
        if batch and (len(batch) == BATCH_IMAGES or number == len(files)):
            predictions = predictor.describe([pixels for _, pixels in batch], printer.num_classes, coverage)
            for (name, _), prediction in zip(batch, predictions, strict=True):
                printer.add(name, prediction)
            batch = []
    printer.close()
    if bad and len(files) == 1:
        raise typer.Exit(1)  # the error was printed
    if bad:
        raise ConvlensError(f"{bad} of {len(files)} images could not be read")


def expand(images: list[str]) -> list[str]:
    """Return the files of arguments: files, the content of folders, globs, and - for a list on standard input."""
    import glob

    files: list[str] = []
    for name in images:
        if name == "-":
            listed = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
            if not listed:
                raise UsageError("standard input lists no files")
            files += listed
        elif Path(name).is_dir():
            inside = sorted(p for p in Path(name).rglob("*") if p.is_file())
            visible = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(name).parts)]
            if not visible:
                raise UsageError(f"the folder {name} is empty")
            files += map(str, visible)
        elif not Path(name).exists() and glob.has_magic(name):
            found = sorted(glob.glob(name, recursive=True))
            if not found:
                raise UsageError(f"no file matches {name}")
            files += found
        else:
            files.append(name)
    return files
