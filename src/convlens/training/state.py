"""The state of a training between steps, and the record of an epoch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EpochRecord:
    """Metrics of one epoch: a row of ``metrics.csv``.

    Attributes:
        epoch: Number of the epoch, from 1.
        seconds: Training time so far, without evaluation and snapshots.
        lr: Learning rate of the last step.
        train_loss: Mean loss (nats) of the augmented training images, measured during the epoch.
        train_acc: Accuracy (0..1) on the same images.
        val_loss: Loss on the validation split, None without one.
        val_acc: Accuracy on the validation split, None without one.
        test_loss: Loss on the test split, only with the recipe's ``log_test_metrics``.
        test_acc: Accuracy on the test split, only with the recipe's ``log_test_metrics``.
    """

    epoch: int
    seconds: float
    lr: float
    train_loss: float
    train_acc: float
    val_loss: float | None = None
    val_acc: float | None = None
    test_loss: float | None = None
    test_acc: float | None = None


@dataclass
class TrainState:
    """The state of a training except tensors; a checkpoint stores all of it.

    Attributes:
        step: Number of steps done.
        seconds: Training time, without evaluation and snapshots.
        loss_sum: Sum of the losses of this epoch's images so far.
        correct: Number of them that were classified correctly.
        seen: Number of them.
        elapsed: Wall-clock time with validation, checkpoints and all; ``max_seconds`` limits it.
        records: One record per finished epoch.
        best_epoch: Epoch with the best validation accuracy; 0: none yet.
        finished: True once early stopping has ended the training.
        grad_accum_steps: Micro-batches of a step: the recipe's number, or more after memory ran out.
    """

    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    elapsed: float = 0.0
    records: list[EpochRecord] = field(default_factory=list)
    best_epoch: int = 0
    finished: bool = False
    grad_accum_steps: int = 1


METRIC_COLUMNS = [field.name for field in dataclasses.fields(EpochRecord)]

TEST_COLUMNS = ("test_loss", "test_acc")  # only with the recipe's log_test_metrics
