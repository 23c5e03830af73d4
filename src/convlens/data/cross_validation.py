"""All images of a data set dealt out anew: the folds of a cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from convlens.data.dataset import SPLIT_SEED, Dataset, Split, rows_by_class
from convlens.errors import UsageError
from convlens.system.random import derive_seed


def merge(dataset: Dataset) -> tuple[Split, list[str]]:
    """Return all images of a data set as one split, and for each the name of the split that it came from."""
    if not isinstance(dataset.train.images, Tensor):
        raise UsageError(f"{dataset.source} has shards, which are not looked at as a whole: name what they are made of")
    parts = dataset.splits
    everything = Split(
        torch.cat([part.images for part in parts.values()]),
        torch.cat([part.labels for part in parts.values()]),
        [image for part in parts.values() for image in part.ids],
    )
    return everything, [name for name, part in parts.items() for _ in range(len(part))]


def assign_folds(labels: Tensor, classes: Sequence[str], folds: int) -> Tensor:
    """Return the fold, int64 (N,) from 0, of each label (N,): every class is dealt out evenly, by a fixed seed.

    Raises UsageError if a class has fewer images than folds.
    """
    fold = torch.empty(len(labels), dtype=torch.int64)
    found = dict(rows_by_class(labels))
    for label, name in enumerate(classes):
        rows = found.get(label, labels[:0])
        if len(rows) < folds:
            raise UsageError(f"class {name!r} has {len(rows)} images, less than one for each of {folds} folds")
        generator = torch.Generator().manual_seed(derive_seed(SPLIT_SEED, label))
        fold[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows)) % folds
    return fold


def take_fold(dataset: Dataset, number: int, folds: int) -> Dataset:
    """Return the data set with fold ``number`` (from 1) of ``folds`` as its test split, and all else for training."""
    everything, splits = merge(dataset)
    if len(set(everything.ids)) < len(everything):  # published sets number each split from 0
        everything = replace(everything, ids=[f"{s}/{i}" for s, i in zip(splits, everything.ids, strict=True)])
    inside = assign_folds(everything.labels, dataset.classes, folds) == number - 1
    return replace(
        dataset,
        train=everything.take((~inside).nonzero().squeeze(1)),
        test=everything.take(inside.nonzero().squeeze(1)),
        validation=None,
        note=f"fold {number} of {folds} is the test split",
        fold=(number, folds),
    )
