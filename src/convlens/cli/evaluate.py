"""``convlens evaluate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from convlens.cli.options import RunData, check_new_file
from convlens.cli.output import Format, describe_test, print_corruptions, print_csv, print_table
from convlens.cli.signals import restore_sigint
from convlens.cli.startup import gc_paused
from convlens.errors import UsageError

MAX_LINES = 30  # of a table of classes; with more classes only the worst are printed
WORST = 10


def evaluate(
    run: Annotated[str, typer.Argument(help="A run folder, a model folder, or a model by name.")],
    data: RunData = None,
    test_on: Annotated[
        str | None, typer.Option(help="Evaluate on the test split of other data with the same classes.")
    ] = None,
    tta: Annotated[bool, typer.Option("--tta", help="Also report test-time augmentation.")] = False,
    corruptions: Annotated[
        bool, typer.Option("--corruptions", help="Evaluate on noisy, blurred, rotated, ... images instead.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="New .png file for a chart of --corruptions.")] = None,
    format: Annotated[Format, typer.Option(help="Output format.")] = Format.text,
) -> None:
    """Evaluate a trained model on the test split again, and print all metrics.

    Examples:
      convlens evaluate runs/mnist-1

      convlens evaluate mnist --format json

      convlens evaluate mnist --corruptions --plot mnist-corrupted.png
    """
    if corruptions and tta:
        raise UsageError("--corruptions and --tta do not go together")
    if plot is not None and not corruptions:
        raise UsageError("--plot draws --corruptions; give both")
    check_new_file(plot, "--plot", "png")
    with gc_paused():
        from convlens.runs.evaluate import evaluate_corruptions, evaluate_run

    restore_sigint()
    if not corruptions:
        print_test(evaluate_run(run, data, test_on=test_on, tta=tta), format)
        return
    clean, accuracies = evaluate_corruptions(run, data, test_on=test_on)
    print_corruptions(run, clean, accuracies, format)
    if plot is not None:
        from convlens.reports.plots import draw_corruptions

        draw_corruptions(plot, clean, accuracies)


def print_test(test: dict[str, Any], format: Format) -> None:
    """Print the metrics of a test and a table of its classes."""
    if format is Format.json:
        print(json.dumps(test, indent=2))
        return
    from convlens.evaluation.report import TestReport

    report = TestReport.from_json(test)
    classes = report.classes
    if format is Format.text and len(classes) > MAX_LINES:
        classes = report.worst_classes(WORST)
    rows: list[tuple[str, ...]] = [("class", "precision", "recall", "f1", "support")]
    for name, c in classes.items():
        rows.append((name, *(f"{getattr(c, key):.4f}" for key in ("precision", "recall", "f1")), str(c.support)))
    if format is Format.csv:
        print_csv(rows)
        print(describe_test(test), file=sys.stderr)  # the table of classes has no row for it
        return
    print(describe_test(test))
    print_table(rows)
    if len(classes) < len(test["classes"]):
        print(
            f"        the {len(classes)} of {len(test['classes']):,} classes with the lowest F1; --format csv has all"
        )
