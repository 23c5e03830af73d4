"""Batches of a split: order and augmentation are functions of (seed, epoch, step), so nothing need be restored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from convlens.data.dataset import Split
from convlens.data.preprocess import Normalise
from convlens.runtime import derive_seed

Augment = Callable[[Tensor, Tensor, Generator], tuple[Tensor, Tensor]]


def count_batches(images: int, batch_size: int) -> int:
    """Return the number of batches in an epoch; the last may be smaller, but a lone last image joins the one before.

    BatchNorm cannot learn from a single value.
    """
    whole, left = divmod(images, batch_size)
    return max(whole + (left > 1), 1)


class Batches:
    """Shuffled, normalised, augmented batches; the images are moved to the device once."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        normalise: Normalise,
        *,
        seed: int,
        device: torch.device,
        augment: Augment,
    ):
        self._images = split.images.to(device)  # (N, C, H, W) uint8
        self._labels = split.labels.to(device)  # (N,) int64
        self._normalise = normalise.to(device)
        self._batch_size, self._seed, self._augment = batch_size, seed, augment
        self._generator = torch.Generator(device)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return count_batches(len(self._labels), self._batch_size)

    def __call__(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Return batch ``index`` of ``epoch``: float images (N, C, H, W), labels (N,) or probabilities (N, K).

        It seeds PyTorch's global generator as well, for nets with dropout.
        """
        if epoch != self._epoch:
            shuffle = torch.Generator().manual_seed(derive_seed(self._seed, epoch))
            self._order = torch.randperm(len(self._labels), generator=shuffle).to(self._labels.device)
            self._epoch = epoch
        step_seed = derive_seed(self._seed, epoch, index)
        torch.manual_seed(step_seed)
        end = None if index == len(self) - 1 else (index + 1) * self._batch_size
        rows = self._order[index * self._batch_size : end]
        images = self._normalise(self._images[rows])
        images, labels = self._augment(images, self._labels[rows], self._generator.manual_seed(step_seed))
        return images.contiguous(memory_format=torch.channels_last), labels
