"""Stratified folds for cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from convlens.data.dataset import SPLIT_SEED, Dataset, Split, rows_by_class
from convlens.errors import UsageError
from convlens.system.random import derive_seed


def merge(dataset: Dataset) -> tuple[Split, list[str]]:
    """Return all images of a data set as one split, and the name of the original split of each image.

    Raises:
        UsageError: The data set is in shards.
    """
    if not isinstance(dataset.train.images, Tensor):
        raise UsageError(f"{dataset.source} is in shards, which cannot be merged; give the original data")
    parts = dataset.splits
    merged = Split(
        images=torch.cat([part.images for part in parts.values()]),
        labels=torch.cat([part.labels for part in parts.values()]),
        ids=[image for part in parts.values() for image in part.ids],
    )
    return merged, [name for name, part in parts.items() for _ in range(len(part))]


def assign_folds(labels: Tensor, classes: Sequence[str], folds: int) -> Tensor:
    """Assign images to stratified folds, with a fixed seed.

    Args:
        labels: int64 (N,).
        classes: The class names.
        folds: The number of folds.

    Returns:
        The fold of each image, int64 (N,), from 0.

    Raises:
        UsageError: A class has fewer images than folds.
    """
    fold = torch.empty(len(labels), dtype=torch.int64)
    found = dict(rows_by_class(labels))
    for label, name in enumerate(classes):
        rows = found.get(label, labels[:0])
        if len(rows) < folds:
            raise UsageError(f"class {name!r} has {len(rows)} images, fewer than the {folds} folds")
        generator = torch.Generator().manual_seed(derive_seed(SPLIT_SEED, label))
        fold[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows)) % folds
    return fold


def take_fold(dataset: Dataset, number: int, folds: int) -> Dataset:
    """Return the data set with fold ``number`` (from 1) of ``folds`` as test split, and all else for training."""
    merged, splits = merge(dataset)
    if len(set(merged.ids)) < len(merged):  # the built-in data sets number each split from 0
        merged = replace(merged, ids=[f"{s}/{i}" for s, i in zip(splits, merged.ids, strict=True)])
    is_test = assign_folds(merged.labels, dataset.classes, folds) == number - 1
    return replace(
        dataset,
        train=merged.select((~is_test).nonzero().squeeze(1)),
        test=merged.select(is_test.nonzero().squeeze(1)),
        validation=None,
        split_description=f"fold {number} of {folds} is the test split",
        fold=(number, folds),
    )
