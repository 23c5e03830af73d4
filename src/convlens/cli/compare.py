"""``convlens compare``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from convlens.cli.output import Format, print_csv
from convlens.cli.startup import gc_paused


def compare(
    runs: Annotated[list[str], typer.Argument(help="Run folders; each is compared with the first.")],
    format: Annotated[Format, typer.Option(help="Output format.")] = Format.text,
) -> None:
    """Compare runs on the same test images, and test whether the difference is more than chance.

    Examples:
      convlens compare runs/mnist-1 runs/mnist-2
    """
    with gc_paused():
        from convlens.runs.compare import compare_runs

    results = compare_runs(runs)
    if format is Format.text:
        for first, other, paired in results:
            print(paired.verdict(first, other))
            print(
                f"        {paired.only_a:,} images are correct only in {first}, {paired.only_b:,} only in {other}; "
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
