"""Batches of a split: order and augmentation are functions of (seed, epoch, step), so nothing need be restored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convlens.data.augment import BatchRandom, mirror
from convlens.data.dataset import Split
from convlens.data.normalize import Normalize
from convlens.distributed.process_group import World
from convlens.errors import UsageError
from convlens.system.random import derive_seed, seed_everything

FLIP = -1  # stands for no epoch: the stream of numbers that says which images are mirrored first
Augment = Callable[[Tensor, Tensor, BatchRandom], tuple[Tensor, Tensor]]


def count_batches(images: int, batch_size: int) -> int:
    """Return the number of batches in an epoch; the last may be smaller, but a lone last image joins the one before.

    BatchNorm cannot learn from a single value.
    """
    whole, left = divmod(images, batch_size)
    return max(whole + (left > 1), 1)


def require_balance(split: Split) -> None:
    """Raise UsageError if the images of ``split`` cannot be drawn one by one: those in shards."""
    if not isinstance(split.images, Tensor):
        raise UsageError(
            "--balanced-sampling draws images from all over; those in shards are read a few shards at a time"
        )


class BatchLoader:
    """Shuffled, normalised, augmented batches; the images are moved to the device once.

    Where several ``ranks`` train together, each gets its part of every batch.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        normalise: Normalize,
        *,
        seed: int,
        device: torch.device,
        augment: Augment,
        flip: bool = False,
        balance: bool = False,
        ranks: World | None = None,
    ):
        if balance:
            require_balance(split)
        self._ranks = ranks or World()
        self._split = split
        try:
            self._images = split.images.to(device)  # (N, C, H, W) uint8
        except torch.OutOfMemoryError:
            raise UsageError(
                f"the {len(split):,} training images do not fit into the memory of the {device.type} device; put them "
                "into shards with convlens data pack, or compute with --device cpu"
            ) from None
        self._labels = split.labels.to(device)  # (N,) int64
        self._normalise = normalise.to(device)
        self._batch_size, self._seed, self._augment = batch_size, seed, augment
        self._generator = torch.Generator(device)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        # alternating flip (K. Jordan 2024): each image in every second epoch, so that none is seen twice the same way;
        # whether in the odd or in the even ones is drawn for each
        first = torch.rand(len(split), generator=torch.Generator().manual_seed(derive_seed(seed, FLIP))) < 0.5
        self._mirrored = first.to(device) if flip else None  # (N,)
        # the chance of each image to be drawn: classes alike, and images alike within a class
        counts = torch.bincount(split.labels).double()
        self._chances = 1 / counts[split.labels] if balance else None  # (N,)

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return count_batches(len(self._labels), self._batch_size)

    def size(self, index: int) -> int:
        """Return the number of images in batch ``index``, of all ranks together."""
        return len(self._labels) - index * self._batch_size if index == len(self) - 1 else self._batch_size

    def __call__(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Return batch ``index`` of ``epoch``: float images (N, C, H, W), labels (N,) or probabilities (N, K).

        It seeds PyTorch's global generator as well, for nets with dropout.
        """
        if epoch != self._epoch:
            if self._chances is None:
                order = self._split.order(self._seed, epoch)
            else:
                shuffle = torch.Generator().manual_seed(derive_seed(self._seed, epoch))
                order = torch.multinomial(self._chances, len(self._labels), replacement=True, generator=shuffle)
            # moved at once, for a step must not wait for it; that of shards is worked out as it is read
            self._epoch, self._order = epoch, order.to(self._labels.device) if isinstance(order, Tensor) else order
        step_seed = derive_seed(self._seed, epoch, index)
        seed_everything(step_seed + self._ranks.rank, self._labels.device)
        count, first = self.size(index), index * self._batch_size
        part = self._ranks.local_slice(count)
        rows = self._order[first : first + count][part]
        images = self._normalise(self._images[rows])
        rows = rows.to(self._labels.device)
        if self._mirrored is not None:
            images = mirror(images, self._mirrored[rows] ^ bool(epoch % 2))
        draws = BatchRandom(self._generator.manual_seed(step_seed), count, part)
        images, labels = self._augment(images, self._labels[rows], draws)
        return images.contiguous(memory_format=torch.channels_last), labels
