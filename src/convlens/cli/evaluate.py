"""``convlens evaluate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from convlens.cli.app import app, gc_paused
from convlens.cli.options import check_new_file
from convlens.cli.output import Format, describe_test, print_corruptions, print_csv, print_table
from convlens.cli.signals import restore_sigint
from convlens.errors import UsageError

MAX_LINES = 30  # of a table of classes; of more classes the worst are printed

WORST = 10


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="A run folder, a model folder, or a model by name.")],
    data: Annotated[str | None, typer.Option(help="Test on this data instead of the run's own.")] = None,
    tta: Annotated[bool, typer.Option("--tta", help="Also average over mirrored, shifted views.")] = False,
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
    with gc_paused():
        from convlens.evaluation.report import TestReport
        from convlens.runs.evaluate import evaluate_corruptions, evaluate_run

    restore_sigint()
    if corruptions:
        if tta:
            raise UsageError("--corruptions and --tta do not go together")
        check_new_file(plot, "--plot", "png")
        clean, figures = evaluate_corruptions(run, data)
        print_corruptions(run, clean, figures, format)
        if plot is not None:
            from convlens.reports.plots import draw_corruptions

            draw_corruptions(plot, clean, figures)
        return
    if plot is not None:
        raise UsageError("--plot draws --corruptions; give both")

    test = evaluate_run(run, data, tta=tta)
    if format is Format.json:
        print(json.dumps(test, indent=2))
        return
    report = TestReport.from_json(test)
    classes = report.classes
    if format is Format.text and len(classes) > MAX_LINES:
        classes = report.worst_classes(WORST)
    rows: list[tuple[str, ...]] = [("class", "precision", "recall", "f1", "support")]
    for name, c in classes.items():
        rows.append((name, *(f"{getattr(c, key):.4f}" for key in ("precision", "recall", "f1")), str(c.support)))
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
