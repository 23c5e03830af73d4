"""Columns of every table of predictions. Must not import torch."""

from __future__ import annotations

from collections.abc import Sequence

MAX_CLASS_COLUMNS = 100  # with more classes, a table has the most probable ones only
TOP_COLUMNS = 5


def probability_columns(classes: Sequence[str]) -> list[str]:
    """Return the columns of probabilities: ``p_<class>``, for many classes ``top1_label``, ``top1_probability``, ..."""
    if len(classes) <= MAX_CLASS_COLUMNS:
        return [f"p_{name}" for name in classes]
    return [f"top{rank}_{what}" for rank in range(1, TOP_COLUMNS + 1) for what in ("label", "probability")]


def num_probabilities(classes: Sequence[str]) -> int:
    """Return how many of the most probable classes a row of a table needs."""
    return len(classes) if len(classes) <= MAX_CLASS_COLUMNS else TOP_COLUMNS


def probability_cells(classes: Sequence[str], top: Sequence[tuple[str, float]]) -> list[str]:
    """Return the cells of :func:`probability_columns` for the most probable classes ``top``, best first."""
    if len(classes) <= MAX_CLASS_COLUMNS:
        values = dict(top)
        return [f"{values[name]:.6f}" for name in classes]
    return [cell for label, value in top[:TOP_COLUMNS] for cell in (label, f"{value:.6f}")]
