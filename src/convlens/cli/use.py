"""``convlens evaluate``, ``mistakes``, ``compare`` and ``predict``: using what was trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from convlens.cli.app import app, check_new_file, heed_interrupts, importing
from convlens.console import Format, Printer, describe_test, print_corruptions, print_csv, print_table
from convlens.errors import ConvlensError, UsageError

MAX_LINES = 30  # of a table of classes; of more classes the worst are printed
WORST = 10


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="A run folder, a model folder, or a model by name.")],
    data: Annotated[str | None, typer.Option(help="Test on this data instead of the run's own.")] = None,
    test_views: Annotated[
        bool, typer.Option("--test-views", help="Also average over mirrored, shifted views.")
    ] = False,
    corruptions: Annotated[
        bool, typer.Option("--corruptions", help="Instead, test on noisy, blurred, turned, ... images.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="With --corruptions: a new .png file to draw them in.")] = None,
    format: Annotated[Format, typer.Option(help="How to print.")] = Format.text,
) -> None:
    """Test a trained net again on the test split, and print every figure. Writes nothing but what is asked for.

    Examples:
      convlens evaluate runs/mnist-1

      convlens evaluate mnist --format json

      convlens evaluate mnist --corruptions --plot mnist-corrupted.png
    """
    with importing():
        from convlens.evaluation.metrics import worst_classes
        from convlens.runs.evaluate import corrupt_run, evaluate_run

    heed_interrupts()
    if corruptions:
        if test_views:
            raise UsageError("--corruptions and --test-views do not go together")
        check_new_file(plot, "--plot", "png")
        clean, figures = corrupt_run(run, data)
        print_corruptions(run, clean, figures, format)
        if plot is not None:
            from convlens.reports.plots import draw_corruptions

            draw_corruptions(plot, clean, figures)
        return
    if plot is not None:
        raise UsageError("--plot draws --corruptions; give both")

    test = evaluate_run(run, data, test_views=test_views)
    if format is Format.json:
        print(json.dumps(test, indent=2))
        return
    classes = test["classes"]
    if format is Format.text and len(classes) > MAX_LINES:
        classes = worst_classes(test, WORST)
    rows = [("class", "precision", "recall", "f1", "n")]
    for name, c in classes.items():
        rows.append((name, *(f"{c[key]:.4f}" for key in ("precision", "recall", "f1")), str(c["n"])))
    if format is Format.csv:
        print_csv(rows)
        print(describe_test(test), file=sys.stderr)  # a table of classes has no row for it
        return
    print(describe_test(test))
    print_table(rows)
    if len(classes) < len(test["classes"]):
        print(
            f"        the {len(classes)} of {len(test['classes']):,} classes with the lowest F1; --format csv has all"
        )


@app.command()
def mistakes(
    run: Annotated[str, typer.Argument(help="A finished run.")],
    to: Annotated[Path | None, typer.Option(help="New folder, instead of RUN/mistakes.")] = None,
    data: Annotated[str | None, typer.Option(help="Where the run's data are, if it does not say.")] = None,
    doubtful: Annotated[int, typer.Option(min=0, help="How many of the least sure right answers to add.")] = 50,
    true: Annotated[str | None, typer.Option(help="Only images of this class.")] = None,
    predicted: Annotated[str | None, typer.Option(help="Only images taken for this class.")] = None,
) -> None:
    """Write the wrong and the most doubtful test images as files: a contact sheet, a CSV, and each as PNG.

    Examples:
      convlens mistakes runs/mnist-1

      convlens mistakes runs/mnist-1 --true 4 --predicted 9 --to fours
    """
    with importing():
        from convlens.runs.mistakes import write_mistakes

    heed_interrupts()
    folder, wrong, unsure = write_mistakes(run, to, data=data, doubtful=doubtful, true=true, predicted=predicted)
    print(f"{wrong:,} wrong and {unsure:,} doubtful images in {folder}")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Run folders; each is set beside the first.")],
    format: Annotated[Format, typer.Option(help="How to print.")] = Format.text,
) -> None:
    """Say which of several runs is better, and whether that is more than chance: each beside the first.

    Examples:
      convlens compare runs/mnist-1 runs/mnist-2
    """
    with importing():
        from convlens.runs.compare import compare_runs

    results = compare_runs(runs)
    if format is Format.text:
        for first, other, paired in results:
            print(paired.verdict(first, other))
            print(
                f"        {paired.only_a:,} images only {first} has right, {paired.only_b:,} only {other}; "
                f"exact McNemar test p = {paired.p_value:.2g}"
            )
        return
    keys = ("n", "only_a", "only_b", "difference", "p_value")
    rows = [
        {"a": a, "b": b, **{key: getattr(paired, key) for key in keys}, "interval": list(paired.interval)}
        for a, b, paired in results
    ]
    if format is Format.json:
        print(json.dumps(rows, indent=2))
    else:
        head = ("a", "b", *keys, "interval_low", "interval_high")
        print_csv([head, *((row["a"], row["b"], *(row[key] for key in keys), *row["interval"]) for row in rows)])


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, a .onnx file, or a model by name.")],
    images: Annotated[list[str], typer.Argument(help="Files, folders, globs; - reads a list of files.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 1,
    format: Annotated[Format, typer.Option(help="How to print.")] = Format.text,
    raw: Annotated[bool, typer.Option("--raw", help="Only resize; do not look for ink on paper.")] = False,
    coverage: Annotated[
        float | None, typer.Option(help="Also name a set of classes that holds the right one so often, such as 0.95.")
    ] = None,
) -> None:
    """Say what pictures show, or that they show nothing known.

    Examples:
      convlens predict mnist scan.png --top 3

      convlens predict runs/photos-1 holiday/ --format csv

      convlens predict mnist scan.png --coverage 0.95

      find . -name '*.jpg' | convlens predict runs/photos-1 -
    """
    with importing():
        from convlens.data.images import BadImage, open_image
        from convlens.evaluation.conformal import require_coverage
        from convlens.inference.onnx_runtime import load_predictor

    predictor = load_predictor(model)
    if coverage is not None:
        require_coverage(coverage, predictor.bounds)
    files = expand(images)
    batch: list[tuple[str, Any]] = []
    bad, printer = 0, Printer(format)
    for number, file in enumerate(files, start=1):
        try:
            batch.append((file, predictor.preprocess.adapt(open_image(file), raw=raw)))
        except BadImage as error:
            bad += 1
            print(f"convlens: {error}", file=sys.stderr)
        if batch and (len(batch) == 256 or number == len(files)):
            predictions = predictor.describe([pixels for _, pixels in batch], top, coverage)
            for (name, _), prediction in zip(batch, predictions, strict=True):
                printer.add(name, prediction)
            batch = []
    printer.close()
    if bad and len(files) == 1:
        raise typer.Exit(1)  # what is wrong has been said
    if bad:
        raise ConvlensError(f"{bad} of {len(files)} images could not be read")


def expand(images: list[str]) -> list[str]:
    """Return the files that arguments name: files, what is in folders, globs, and - for a list on standard input."""
    import glob

    files: list[str] = []
    for name in images:
        if name == "-":
            listed = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
            if not listed:
                raise UsageError("standard input named no file")
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
