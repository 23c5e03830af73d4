"""Loss, accuracy, the Wilson interval and the confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from convlens.data.dataset import Split
from convlens.data.normalize import Normalize
from convlens.distributed.process_group import World
from convlens.evaluation.inference import compute_logits

Z95 = 1.959963984540054  # two-sided 95% point of the normal distribution

MAX_CHUNK_VALUES = 1 << 24  # logits in one chunk: 128 MiB as float64

MAX_DENSE_CLASSES = 100  # larger confusion matrices are neither drawn nor stored as a whole

Cell = tuple[str, str, int]  # of a confusion matrix: true label, predicted label, count


def row_chunks(width: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the rows of several tensors (N, ...) in chunks.

    With many classes, temporaries of size images x classes would not fit into memory. With few classes there is a
    single chunk.

    Args:
        width: Number of values that the caller computes per row.
        tensors: Tensors with the same number of rows.
    """
    yield from zip(*(torch.split(tensor, max(MAX_CHUNK_VALUES // width, 1)) for tensor in tensors), strict=True)


@dataclass(frozen=True)
class Scores:
    """Loss (mean cross-entropy in nats) and accuracy (0..1) on a split."""

    loss: float
    accuracy: float

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Scores:
        """Compute the scores of logits (N, K) and labels (N,)."""
        labels = labels.to(logits.device)
        chunks = row_chunks(logits.shape[1], logits, labels)
        loss = sum(len(y) / len(labels) * F.cross_entropy(z, y).item() for z, y in chunks)
        return cls(loss, (logits.argmax(dim=1) == labels).float().mean().item())


def evaluate(
    model: nn.Module,
    split: Split,
    normalize: Normalize,
    *,
    batch_size: int = 500,
    autocast: AbstractContextManager[object] | None = None,
    world: World | None = None,
) -> Scores:
    """Evaluate a model on a split.

    Args:
        model: The model; it is put into evaluation mode for the call.
        split: The images and labels.
        normalize: Turns images into the model's input.
        batch_size: Images in one forward pass.
        autocast: Context manager for mixed precision.
        world: The process group; each rank evaluates a part of the split, and all get the same result.

    Returns:
        Loss and accuracy.
    """
    world = world or World()
    local_images = split.images[world.local_slice(len(split))]
    logits = compute_logits(model, local_images, normalize, batch_size=batch_size, autocast=autocast)
    return Scores.of(world.all_gather(logits, len(split)), split.labels)


def wilson_interval(correct: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Return the score interval of a proportion ``correct / n``, by default at 95% (Wilson 1927).

    >>> [round(end, 4) for end in wilson_interval(9900, 10000)]
    [0.9879, 0.9918]
    """
    proportion = correct / n
    center = proportion + z * z / (2 * n)
    margin = z * math.sqrt(proportion * (1 - proportion) / n + z * z / (4 * n * n))
    return max((center - margin) / (1 + z * z / n), 0.0), min((center + margin) / (1 + z * z / n), 1.0)


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Return the confusion matrix, int64 (K, K): rows are true classes, columns are predictions.

    >>> confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def dense_confusion(cells: Iterable[Sequence[Any]], classes: Sequence[str]) -> NDArray[np.int64]:
    """Return the confusion matrix, int64 (K, K), from its non-zero cells (true label, predicted label, count).

    >>> dense_confusion([("cat", "dog", 2)], ("cat", "dog")).tolist()
    [[0, 2], [0, 0]]
    """
    index = {name: i for i, name in enumerate(classes)}
    matrix = np.zeros((len(classes), len(classes)), np.int64)
    for true, predicted, count in cells:
        matrix[index[true], index[predicted]] = int(count)
    return matrix
