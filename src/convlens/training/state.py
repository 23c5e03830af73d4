"""The state of a training between steps, and the record of an epoch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch came to: a row of ``metrics.csv``. ``seconds`` is training time so far, without evaluation.

    ``epoch`` counts from 1. Losses are means in nats, accuracies 0..1; those of training are of the augmented images,
    as they went by. Those of the test split are there only where the recipe watches it.
    """

    epoch: int
    seconds: float
    lr: float  # of the last step
    train_loss: float
    train_acc: float
    val_loss: float | None = None
    val_acc: float | None = None
    test_loss: float | None = None
    test_acc: float | None = None


@dataclass
class TrainState:
    """Everything that a training has come to, besides tensors."""

    step: int = 0
    seconds: float = 0.0
    # of the epoch that is under way
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    # with validation, checkpoints and all: the clock of a training whose length is given in seconds
    elapsed: float = 0.0
    records: list[EpochRecord] = field(default_factory=list)
    best_epoch: int = 0  # 0: none yet
    finished: bool = False
    grad_accum_steps: int = 1  # in which a batch goes through the net: the recipe's, or more once memory has run out


METRIC_COLUMNS = [field.name for field in dataclasses.fields(EpochRecord)]

TEST_COLUMNS = ("test_loss", "test_acc")  # only where the recipe watches the test split
