"""Batches of a split. Order and augmentation are functions of (seed, epoch, batch), so resuming needs no state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convlens.data.augment import BatchRandom, hflip
from convlens.data.dataset import Split
from convlens.data.normalize import Normalize
from convlens.distributed.process_group import World
from convlens.errors import UsageError
from convlens.system.random import derive_seed, seed_everything

HFLIP_STREAM = -1  # in place of an epoch, for the random numbers that choose which images are flipped first

Augment = Callable[[Tensor, Tensor, BatchRandom], tuple[Tensor, Tensor]]


def count_batches(images: int, batch_size: int) -> int:
    """Return the number of batches in an epoch.

    The last batch may be smaller. A single remaining image joins the batch before it, because BatchNorm cannot
    compute a variance from one value.
    """
    full, remainder = divmod(images, batch_size)
    return max(full + (remainder > 1), 1)


def require_balance(split: Split) -> None:
    """Raise UsageError if ``split`` is in shards, which do not support random access to single images."""
    if not isinstance(split.images, Tensor):
        raise UsageError("`balanced_sampling` needs random access to the images, and shards are read a few at a time")


class BatchLoader:
    """Shuffled, normalized and augmented batches.

    Args:
        split: The images. They are moved to the device of ``normalize`` once.
        batch_size: The number of images in a batch, over all ranks.
        normalize: Turns pixels into the input of the model.
        seed: Determines order and augmentation, together with the epoch and the index of a batch.
        augment: Changes a batch (images, labels, random numbers).
        hflip: Alternating flip: mirror every image in every second epoch.
        balanced_sampling: Draw images with replacement, all classes equally often.
        world: The ranks that train together. Each loads its slice of every batch.

    Raises:
        UsageError: The images do not fit into the memory of the device, or cannot be sampled one by one.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        normalize: Normalize,
        *,
        seed: int,
        augment: Augment,
        hflip: bool = False,
        balanced_sampling: bool = False,
        world: World | None = None,
    ):
        if balanced_sampling:
            require_balance(split)
        device = normalize.scale.device
        self._world = world or World()
        self._split = split
        try:
            self._images = split.images.to(device)  # (N, C, H, W) uint8
        except torch.OutOfMemoryError:
            raise UsageError(
                f"the {len(split):,} training images do not fit into the memory of the {device.type} device; "
                "convert them to shards with convlens data pack, or set `device` to cpu"
            ) from None
        self._labels = split.labels.to(device)  # (N,) int64
        self._normalize, self._augment = normalize, augment
        self._batch_size, self._seed = batch_size, seed
        self._generator = torch.Generator(device)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        # Alternating flip (Jordan 2024): an image is never seen the same way in two consecutive epochs. A random
        # number per image chooses whether the odd or the even epochs flip it.
        first = torch.rand(len(split), generator=torch.Generator().manual_seed(derive_seed(seed, HFLIP_STREAM))) < 0.5
        self._flipped_first = first.to(device) if hflip else None  # (N,)
        counts = torch.bincount(split.labels).double()
        self._weights = 1 / counts[split.labels] if balanced_sampling else None  # (N,)

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return count_batches(len(self._labels), self._batch_size)

    def size(self, index: int) -> int:
        """Return the number of images in batch ``index``, over all ranks."""
        return len(self._labels) - index * self._batch_size if index == len(self) - 1 else self._batch_size

    def __call__(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Return batch ``index`` of ``epoch``, and seed PyTorch's global generator for models with dropout.

        Returns:
            Images, float (N, C, H, W), and labels: int64 (N,), or probabilities, float (N, K).
        """
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._epoch_order(epoch)
        batch_seed = derive_seed(self._seed, epoch, index)
        seed_everything(batch_seed + self._world.rank, self._labels.device)
        count, first = self.size(index), index * self._batch_size
        part = self._world.local_slice(count)
        rows = self._order[first : first + count][part]
        images = self._normalize(self._images[rows])
        rows = rows.to(self._labels.device)
        if self._flipped_first is not None:
            images = hflip(images, self._flipped_first[rows] ^ bool(epoch % 2))
        draws = BatchRandom(self._generator.manual_seed(batch_seed), count, part)
        images, labels = self._augment(images, self._labels[rows], draws)
        return images.contiguous(memory_format=torch.channels_last), labels

    def _epoch_order(self, epoch: int) -> Tensor:
        """Return the rows of an epoch, int64 (N,), on the device."""
        if self._weights is not None:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, epoch))
            order = torch.multinomial(self._weights, len(self._labels), replacement=True, generator=generator)
        else:
            order = self._split.order(self._seed, epoch)
        # One copy per epoch, so that no step waits for it. The order of shards is computed as it is read.
        return order.to(self._labels.device) if isinstance(order, Tensor) else order
