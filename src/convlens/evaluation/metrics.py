"""How good a net is on a split: logits, loss, accuracy with its interval, and figures per class."""

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

MAX_VALUES = 1 << 24  # of logits that are worked on at a time: 128 MiB as float64

MAX_DENSE_CLASSES = 100  # of a confusion matrix that is drawn, or kept, as a whole

Cell = tuple[str, str, int]  # of a confusion matrix: true label, predicted label, count


def row_chunks(width: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield rows of tensors (N, ...) together, a few at a time, for work that takes ``width`` values per row.

    Temporaries of all images x all classes would not fit into memory with many classes. With few classes all rows
    are one chunk.
    """
    yield from zip(*(torch.split(tensor, max(MAX_VALUES // width, 1)) for tensor in tensors), strict=True)


@dataclass(frozen=True)
class Scores:
    """Loss (mean cross-entropy, nats) and accuracy (0..1) on a split."""

    loss: float
    accuracy: float

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Scores:
        """Measure logits (N, K) against labels (N,)."""
        labels = labels.to(logits.device)
        chunks = row_chunks(logits.shape[1], logits, labels)
        loss = sum(len(y) / len(labels) * F.cross_entropy(z, y).item() for z, y in chunks)
        return cls(loss, (logits.argmax(dim=1) == labels).float().mean().item())


def evaluate(
    net: nn.Module,
    split: Split,
    normalise: Normalize,
    *,
    batch_size: int = 500,
    autocast: AbstractContextManager[object] | None = None,
    ranks: World | None = None,
) -> Scores:
    """Return loss and accuracy of ``net`` on ``split``; several ``ranks`` share the work, and all get the result."""
    ranks = ranks or World()
    mine = split.images[ranks.local_slice(len(split))]
    logits = compute_logits(net, mine, normalise, batch_size=batch_size, autocast=autocast)
    return Scores.of(ranks.all_gather(logits, len(split)), split.labels)


def wilson_interval(correct: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Return the score interval (Wilson 1927) of a share ``correct / n``, by default at 95%.

    >>> [round(end, 4) for end in wilson_interval(9900, 10000)]
    [0.9879, 0.9918]
    """
    share = correct / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max((centre - spread) / (1 + z * z / n), 0.0), min((centre + spread) / (1 + z * z / n), 1.0)


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Return counts, int64 (K, K): rows are true classes, columns predictions; of labels 0..K-1, int64 (N,) each.

    >>> confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def classification_report(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return every metric of a test as plain values: what ``test.json`` and ``confusion_matrix.csv`` hold.

    Loss, accuracy with its Wilson 95% interval, precision, recall, F1 and count per class, and the cells of the
    confusion matrix that are not 0, each as [true label, predicted label, count], from logits (N, K) and labels (N,).
    """
    logits, labels = logits.cpu(), labels.cpu()
    n, k = len(labels), len(classes)
    guesses = logits.argmax(dim=1)
    right, support, predicted = (
        torch.bincount(rows, minlength=k).numpy() for rows in (labels[labels == guesses], labels, guesses)
    )
    cells, counts = torch.unique(labels * k + guesses, return_counts=True)  # dense, it would have K x K numbers
    correct = int(right.sum())
    precision, recall = right / np.maximum(predicted, 1), right / np.maximum(support, 1)  # 0 of a class never met
    f1 = 2 * right / np.maximum(support + predicted, 1)
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "accuracy_interval": list(wilson_interval(correct, n)),
        "interval_method": "Wilson, 95%",
        "balanced_accuracy": float(recall[support > 0].mean()),  # the mean over classes of the share that is right
        "macro_f1": float(f1[support > 0].mean()),
        "loss": Scores.of(logits, labels).loss,
        "classes": {
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "n": int(support[i]),
            }
            for i, name in enumerate(classes)
        },
        "confusion_matrix": [
            [classes[cell // k], classes[cell % k], count]
            for cell, count in zip(cells.tolist(), counts.tolist(), strict=True)
        ],
    }


def dense_confusion(cells: Iterable[Sequence[Any]], classes: Sequence[str]) -> NDArray[np.int64]:
    """Return the confusion matrix, int64 (K, K), of its non-zero cells, each (true label, predicted label, count).

    >>> dense_confusion([("cat", "dog", 2)], ("cat", "dog")).tolist()
    [[0, 2], [0, 0]]
    """
    number = {name: i for i, name in enumerate(classes)}
    matrix = np.zeros((len(classes), len(classes)), np.int64)
    for true, predicted, count in cells:
        matrix[number[true], number[predicted]] = int(count)
    return matrix


def worst_classes(test: dict[str, Any], most: int) -> dict[str, dict[str, float]]:
    """Return the metrics of the ``most`` classes with the lowest F1, the worst first, of those with test images."""
    tested = [(name, values) for name, values in test["classes"].items() if values["n"]]
    return dict(sorted(tested, key=lambda one: one[1]["f1"])[:most])
