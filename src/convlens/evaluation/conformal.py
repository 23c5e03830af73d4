"""Prediction sets by split conformal prediction. Must not import torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from convlens.errors import UsageError

COVERAGE_LEVELS = tuple(round(0.5 + 0.005 * step, 3) for step in range(100))  # a bundle stores one threshold for each


def require_coverage(coverage: float, thresholds: Sequence[float] | None) -> None:
    """Check that prediction sets of this coverage are available.

    Args:
        coverage: The requested probability that a set contains the true class.
        thresholds: The conformal thresholds of the model; None if it has none.

    Raises:
        UsageError: If the model has no thresholds, or ``coverage`` is out of range.
    """
    if thresholds is None:
        raise UsageError("this model has no prediction sets: it was trained without validation images")
    low, high = COVERAGE_LEVELS[0], COVERAGE_LEVELS[-1]
    if not low <= coverage <= high:
        raise UsageError(f"`coverage` is {coverage:g}; it must be from {low:g} to {high:g}")


def prediction_sets(
    nonconformity: NDArray[np.floating], thresholds: Sequence[float], coverage: float
) -> NDArray[np.bool_]:
    """Return which classes belong to the prediction set of each image.

    A set may be empty: the image then resembles every class less than the given fraction of validation images resemble
    their own class.

    Args:
        nonconformity: -log p of every class, (N, K).
        thresholds: One threshold of -log p for each of ``COVERAGE_LEVELS``.
        coverage: The requested coverage; a value between two levels counts as the higher one.

    Returns:
        Membership, bool (N, K).
    """
    level = next(i for i, level in enumerate(COVERAGE_LEVELS) if level >= coverage - 1e-9)
    return nonconformity <= thresholds[level]
