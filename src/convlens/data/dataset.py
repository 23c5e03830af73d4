"""The one form of data: splits of uint8 images and int64 labels."""

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

# Unsplit data is split with this seed, whatever the seed of the run, so that all runs share one test split.
SPLIT_SEED = 0
TEST_FRACTION = 0.2
HELD_OUT = f"{TEST_FRACTION:.0%} of every class is the test split (seed {SPLIT_SEED})"


def rows_by_class(labels: Tensor) -> list[tuple[int, Tensor]]:
    """Return each label that occurs in ``labels``, int64 (N,), with its rows; both in ascending order."""
    found, counts = torch.unique(labels, return_counts=True)
    rows = torch.split(labels.argsort(stable=True), counts.tolist())
    return list(zip(found.tolist(), rows, strict=True))


@dataclass(frozen=True, eq=False, kw_only=True)
class Split:
    """Images with their labels and ids.

    Args:
        images: uint8 (N, C, H, W). In memory, memory-mapped, or, for shards, an object that is indexed like a tensor.
        labels: int64 (N,).
        ids: The name of each image: the path of its file, or its index in the source.

    >>> images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1])
    >>> rest, part = Split(images=images, labels=labels, ids=IndexIds(4)).stratified_split(0.5, seed=0)
    >>> len(part), part.labels
    (2, tensor([0, 1]))
    """

    images: Tensor
    labels: Tensor
    ids: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor) -> Split:
        """Return the images at ``rows``, int64 (M,), as a new split.

        The new split is in memory, or memory-mapped if it is larger than a quarter of the memory.

        Raises:
            IndexError: A row is out of range.
        """
        ids = [self.ids[row] for row in rows.tolist()]
        return Split(images=gather(self.images, rows), labels=self.labels[rows], ids=ids)

    def evenly_spaced(self, count: int) -> Tensor:
        """Return up to ``count`` row indices, int64, evenly spaced over the split.

        The images of a folder are sorted by class, so the first rows would not represent all classes.
        """
        count = min(count, len(self))
        return torch.arange(count) * (len(self) - 1) // max(count - 1, 1)

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return the shuffled row indices of an epoch, int64 (N,), as a function of (seed, epoch)."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(derive_seed(seed, epoch)))

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the pixels and labels."""
        digest = hashlib.sha256(self.images.contiguous().numpy().data)
        digest.update(self.labels.numpy().data)
        return digest.hexdigest()

    def stratified_split(self, fraction: float, seed: int) -> tuple[Split, Split]:
        """Split at random within each class, and keep the order of the images.

        Args:
            fraction: The fraction of every class that goes into the second part, 0..1. A class with at least two
                images has at least one in each part; a class with one image stays in the first.
            seed: Chooses the images.

        Returns:
            The rest, and the part with ``fraction`` of every class.
        """
        chosen = []
        for label, rows in rows_by_class(self.labels):
            count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
            generator = torch.Generator().manual_seed(derive_seed(seed, label))
            chosen.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
        mask = torch.zeros(len(self), dtype=torch.bool)
        mask[torch.cat(chosen)] = True
        return self.select((~mask).nonzero().squeeze(1)), self.select(mask.nonzero().squeeze(1))


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """A data set: its splits, its class names and the style of its images.

    :func:`convlens.load_dataset` and :func:`convlens.from_arrays` create one.

    Args:
        name: The name, for people.
        source: The name or absolute path that :func:`convlens.load_dataset` loads it from; None for objects in memory.
        classes: The class names. A label is an index into them.
        train: The training split.
        test: The test split.
        validation: The validation split; None if the recipe takes a fraction of the training split.
        input_style: How a new image is prepared to look like the ones in the data set.
        split_description: How the splits were made, for people.
        unreadable: Why each of the files that were skipped cannot be read.
        fold: ``(3, 5)`` if the test split is the third of five folds of all images.
        excluded: The images that were excluded on request.
    """

    name: str
    source: str | None = None
    classes: tuple[str, ...]
    train: Split
    test: Split
    validation: Split | None = None
    input_style: InputStyle = InputStyle()
    split_description: str = ""
    unreadable: tuple[str, ...] = ()
    fold: tuple[int, int] | None = None
    excluded: tuple[str, ...] = ()

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

    def drop(self, names: Collection[str]) -> Dataset:
        """Return the data set without the named images.

        Args:
            names: Image ids, or ``split/id``.

        Raises:
            UsageError: No image has one of the names, or too few images remain to train or test with.
        """
        requested = set(names)
        if not requested:
            return self
        unknown = set(requested)
        splits: dict[str, Any] = {"validation": None}
        for name, split in self.splits.items():
            matches = [{image, f"{name}/{image}"} & requested for image in split.ids]
            unknown -= set().union(*matches)
            kept = split.select(torch.tensor([row for row, match in enumerate(matches) if not match]).long())
            splits[name] = kept if len(kept) or name != "validation" else None
        if unknown:
            more = f" (nor {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise UsageError(f"{self.name} has no image {min(unknown)!r}{more}")
        check_classes(self.name, self.classes, splits["train"])
        if not splits["test"]:
            raise UsageError(f"{self.name}: no test image is left")
        description = f"{self.split_description}; {len(requested):,} images excluded on request"
        excluded = tuple(sorted({*self.excluded, *requested}))
        return replace(self, **splits, split_description=description, excluded=excluded)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the classes, pixels and labels: two data sets are equal if these are."""
        digest = hashlib.sha256(repr((self.classes, self.shape)).encode())
        for name, split in self.splits.items():
            digest.update(f"{name}:{len(split)}".encode())
            digest.update(split.images.contiguous().numpy().data)
            digest.update(split.labels.numpy().data)
        return digest.hexdigest()

    def with_validation(self, fraction: float, seed: int) -> Dataset:
        """Return the data set with a validation split: its own, or ``fraction`` (0..1) of every training class.

        There is no validation split if ``fraction`` is 0 or every class has a single image.
        """
        if self.validation is not None or fraction == 0:
            return self
        train, validation = self.train.stratified_split(fraction, seed)
        return replace(self, train=train, validation=validation) if len(validation) else self


class IndexIds(Sequence[str]):
    """The ids of ``count`` images without names: "0", "1", ..."""

    def __init__(self, count: int):
        self._indices = range(count)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[str]:
        return map(str, self._indices)

    def __getitem__(self, key: Any) -> Any:
        return [str(i) for i in self._indices[key]] if isinstance(key, slice) else str(self._indices[key])


def check_classes(name: str, classes: Sequence[str], train: Split, where: str = "the training split") -> None:
    """Raise UsageError unless ``train`` has at least two classes and two images of every class."""
    if len(classes) < 2:
        found = f"only one class, {classes[0]!r}" if classes else "no class"
        raise UsageError(f"{name} has {found}; a classifier needs at least two")
    counts = torch.bincount(train.labels, minlength=len(classes)).tolist()
    for label, count in zip(classes, counts, strict=True):
        if count < 2:
            images = "no readable image" if count == 0 else "only one image"
            raise UsageError(f"{name}: class {label!r} has {images} in {where}; it needs at least 2")
