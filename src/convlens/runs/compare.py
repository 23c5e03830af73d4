"""Compare runs on the same test images."""

from __future__ import annotations

from convlens.errors import UnfinishedRunError, UsageError
from convlens.evaluation.significance import McNemarResult
from convlens.runs.run import Run


def compare_runs(paths: list[str]) -> list[tuple[str, str, McNemarResult]]:
    """Compare each run with the first one, by McNemar's test on their ``predictions.csv``.

    Args:
        paths: Two or more run folders.

    Returns:
        For each run after the first: the path of the first, its own path, and the result.

    Raises:
        UsageError: Less than two runs, an unfinished run, or other test images.
    """
    if len(paths) < 2:
        raise UsageError("name two or more runs to compare")
    runs = [Run(path) for path in paths]
    correct = [read_correctness(run) for run in runs]
    pixels = [run.config["data"].get("test_fingerprint") for run in runs]
    results = []
    for path, other, tested in zip(paths[1:], correct[1:], pixels[1:], strict=True):
        if other.keys() != correct[0].keys() or tested != pixels[0]:
            raise UsageError(f"{paths[0]} and {path} were tested on different images and cannot be compared")
        pairs = [(correct[0][image], other[image]) for image in other]
        only_a, only_b = (sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))
        results.append((paths[0], path, McNemarResult(len(pairs), only_a, only_b)))
    return results


def read_correctness(run: Run) -> dict[tuple[str, str], bool]:
    """Return whether each test image, (id, true label), was classified correctly."""
    if not run.run_dir.predictions.is_file():
        raise UnfinishedRunError(run.path)
    return {
        (row["image_id"], row["true_label"]): row["true_label"] == row["predicted_label"] for row in run.predictions
    }
