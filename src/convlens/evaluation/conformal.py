"""Prediction sets: which classes an answer must name to hold the right one as often as was asked. Without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from convlens.errors import UsageError

COVERAGE_LEVELS = tuple(round(0.5 + 0.005 * step, 3) for step in range(100))  # coverages that a bundle has a bound for


def require_coverage(coverage: float, bounds: Sequence[float] | None) -> None:
    """Raise UsageError unless a model with these bounds can give prediction sets of this coverage."""
    if bounds is None:
        raise UsageError("this model has no prediction sets: it was trained without validation images")
    if not COVERAGE_LEVELS[0] <= coverage <= COVERAGE_LEVELS[-1]:
        low, high = COVERAGE_LEVELS[0], COVERAGE_LEVELS[-1]
        raise UsageError(f"--coverage is {coverage:g}; it must be from {low:g} to {high:g}")


def prediction_sets(surprise: NDArray[np.floating], bounds: Sequence[float], coverage: float) -> NDArray[np.bool_]:
    """Return which classes are in the prediction set of each image, bool (N, K), for -log p of every class (N, K).

    ``bounds`` has one of -log p for each of ``LEVELS``; ``coverage`` between two levels counts as the higher. A set may
    be empty: the image is then less like any class than that share of known images are like their own.
    """
    level = next(i for i, level in enumerate(COVERAGE_LEVELS) if level >= coverage - 1e-9)
    return surprise <= bounds[level]
