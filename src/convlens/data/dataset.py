"""The one form of data: splits of uint8 images and int64 labels, and how a split is divided."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from convlens.data.cache import gather
from convlens.data.images import InputStyle
from convlens.errors import UsageError
from convlens.system.random import derive_seed

# Unsplit data is divided once, by this seed, whatever the seed of the run: every run is judged on one test split.
SPLIT_SEED = 0
TEST_FRACTION = 0.2
HELD_OUT = f"{TEST_FRACTION:.0%} of every class is the test split (seed {SPLIT_SEED})"


def rows_by_class(labels: Tensor) -> list[tuple[int, Tensor]]:
    """Return each label that occurs in ``labels`` (N,), in order, with its rows, ascending: in one pass for all."""
    found, counts = torch.unique(labels, return_counts=True)
    rows = torch.split(labels.argsort(stable=True), counts.tolist())
    return list(zip(found.tolist(), rows, strict=True))


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels. ``ids`` names each image (a file's path, or its number in the source).

    >>> split = Split(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), Numbers(4))
    >>> rest, part = split.divide(0.5, seed=0)
    >>> len(part), part.labels
    (2, tensor([0, 1]))
    """

    images: Tensor  # (N, C, H, W) uint8, in memory, memory-mapped, or (of shards) what can be indexed like it
    labels: Tensor  # (N,) int64
    ids: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Split:
        """Return the images at ``rows``, int64 (M,), as a new split; IndexError for rows beyond its end.

        It is in memory, unless it would take more than a quarter of it: then it is memory-mapped.
        """
        return Split(gather(self.images, rows), self.labels[rows], [self.ids[row] for row in rows.tolist()])

    def spread(self, most: int) -> Tensor:
        """Return the rows, int64, of at most so many images, evenly from all of them: a folder's lie class by class."""
        count = min(most, len(self))
        return torch.arange(count) * (len(self) - 1) // max(count - 1, 1)

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return the rows in the order of an epoch, int64 (N,): a function of (seed, epoch)."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(derive_seed(seed, epoch)))

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of pixels and labels."""
        digest = hashlib.sha256(self.images.contiguous().numpy().data)
        digest.update(self.labels.numpy().data)
        return digest.hexdigest()

    def divide(self, fraction: float, seed: int) -> tuple[Split, Split]:
        """Return (rest, part): ``part`` has ``fraction`` of every class, chosen by ``seed``; both keep the order.

        ``fraction`` is 0..1. Every class with two images or more has at least one in each; a single image stays in the
        rest.
        """
        chosen = []
        for label, rows in rows_by_class(self.labels):
            count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
            generator = torch.Generator().manual_seed(derive_seed(seed, label))
            chosen.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
        mask = torch.zeros(len(self), dtype=torch.bool)
        mask[torch.cat(chosen)] = True
        return self.take((~mask).nonzero().squeeze(1)), self.take(mask.nonzero().squeeze(1))


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set: its splits, class names, and what a picture from outside must become to look like it.

    Labels are numbers of ``classes``, from 0. :func:`convlens.load_dataset` and :func:`convlens.from_arrays` make one.
    """

    name: str
    source: str | None  # what load_dataset took (a name or an absolute path); None: made from objects in memory
    classes: tuple[str, ...]
    train: Split
    test: Split
    validation: Split | None  # None: the recipe carves it from train
    style: InputStyle
    note: str  # how the splits came about, for people
    unreadable: tuple[str, ...] = ()  # files that were skipped
    fold: tuple[int, int] | None = None  # (3, 5): the test split is the third of five folds of all images
    left_out: tuple[str, ...] = ()  # names of images that were there, and were excluded on request

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that exist, by name."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}

    def without(self, names: Collection[str]) -> Dataset:
        """Return the data set without the images of these names: an id, or ``split/id``.

        Raises UsageError if a name is of no image, or too little is left to train or to test.
        """
        asked = set(names)
        if not asked:
            return self
        left = set(asked)
        parts: dict[str, Split | None] = {"train": self.train, "validation": self.validation, "test": self.test}
        for name, split in self.splits.items():
            own = [{image, f"{name}/{image}"} & asked for image in split.ids]
            left -= set().union(*own)
            kept = split.take(torch.tensor([row for row, found in enumerate(own) if not found]).long())
            parts[name] = kept if len(kept) or name != "validation" else None
        if left:
            more = f" (nor {len(left) - 1} more)" if len(left) > 1 else ""
            raise UsageError(f"{self.name} has no image {min(left)!r}{more}")
        check_classes(self.name, self.classes, parts["train"])  # type: ignore[arg-type]
        if not parts["test"]:
            raise UsageError(f"{self.name}: no test image is left")
        note = f"{self.note}; {len(asked):,} images left out on request"
        return replace(self, **parts, note=note, left_out=tuple(sorted({*self.left_out, *asked})))  # type: ignore[arg-type]

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of all pixels and labels: equal if and only if the data are equal."""
        digest = hashlib.sha256(repr((self.classes, self.shape)).encode())
        for name, split in self.splits.items():
            digest.update(f"{name}:{len(split)}".encode())
            digest.update(split.images.contiguous().numpy().data)
            digest.update(split.labels.numpy().data)
        return digest.hexdigest()

    def with_validation(self, fraction: float, seed: int) -> Dataset:
        """Return the data set with a validation split: its own, or ``fraction`` (0..1) of every class of train.

        With a fraction of 0, or where no class has an image to spare, there is none.
        """
        if self.validation is not None or fraction == 0:
            return self
        train, validation = self.train.divide(fraction, seed)
        return replace(self, train=train, validation=validation) if len(validation) else self


class IndexIds(Sequence[str]):
    """The ids of so many images that have no names: "0", "1", ..."""

    def __init__(self, count: int):
        self._numbers = range(count)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[str]:
        return map(str, self._numbers)

    def __getitem__(self, key: Any) -> Any:
        return [str(n) for n in self._numbers[key]] if isinstance(key, slice) else str(self._numbers[key])


def check_classes(name: str, classes: Sequence[str], train: Split, what: str = "the training split") -> None:
    """Raise UsageError unless ``train`` has at least two classes and two images of every class."""
    if len(classes) < 2:
        found = f"only one class, {classes[0]!r}" if classes else "no class"
        raise UsageError(f"{name} has {found}; a classifier needs at least two")
    counts = torch.bincount(train.labels, minlength=len(classes)).tolist()
    for label, count in zip(classes, counts, strict=True):
        if count < 2:
            images = "no readable image" if count == 0 else "only one image"
            raise UsageError(f"{name}: class {label!r} has {images} in {what}; it needs at least 2")
