"""Compare two runs on the same test images."""

from __future__ import annotations

from convlens.errors import ConvlensError, UsageError
from convlens.evaluation.significance import McNemarResult
from convlens.runs.run import Run
from convlens.system.text import quoted


def compare_runs(paths: list[str]) -> list[tuple[str, str, McNemarResult]]:
    """Return (first, other, Paired) for each run beside the first, from their ``predictions.csv``.

    Raises UsageError unless all were tested on the same images.
    """
    if len(paths) < 2:
        raise UsageError("name two runs or more to compare")
    answers = [read_correctness(Run(path)) for path in paths]
    pixels = [Run(path).config["data"].get("test_fingerprint") for path in paths]
    results = []
    for path, other, tested in zip(paths[1:], answers[1:], pixels[1:], strict=True):
        if other.keys() != answers[0].keys() or tested != pixels[0]:
            raise UsageError(f"{paths[0]} and {path} were tested on other images: they cannot be compared")
        right = [(answers[0][image], other[image]) for image in other]
        only_a, only_b = (sum(a and not b for a, b in right), sum(b and not a for a, b in right))
        results.append((paths[0], path, McNemarResult(len(right), only_a, only_b)))
    return results


def read_correctness(run: Run) -> dict[tuple[str, str], bool]:
    """Return which test images a run has right: (id, label) -> right?"""
    if not run.folder.predictions.is_file():
        raise ConvlensError(f"{run.path} is not finished: go on with: convlens train --resume {quoted(run.path)}")
    return {(row["id"], row["label"]): row["label"] == row["prediction"] for row in run.predictions}
