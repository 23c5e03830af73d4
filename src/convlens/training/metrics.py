"""Running loss and accuracy of the current epoch, accumulated on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convlens.distributed.process_group import World
from convlens.training.state import TrainState


@dataclass(frozen=True)
class Progress:
    """Position and running metrics of a training.

    Attributes:
        step: Number of steps done.
        total: Number of steps of the whole training; with ``max_seconds`` an estimate.
        epoch: Number of epochs done, with a fraction.
        loss: Mean training loss of this epoch so far, in nats.
        accuracy: Training accuracy of this epoch so far, 0..1.
        images_per_second: Training throughput of this epoch.
        eta_seconds: Estimated seconds until the end of the training.
        epoch_done: Fraction of this epoch's work that is done, 0..1; 1 after its last step.
    """

    step: int
    total: int
    epoch: float
    loss: float
    accuracy: float
    images_per_second: float
    eta_seconds: float
    epoch_done: float = 1.0

    def __str__(self) -> str:
        metrics = f"loss {self.loss:.4f}  accuracy {self.accuracy:.2%}  {self.eta_seconds:,.0f} s left in all"
        return f"{metrics}  {self.images_per_second:,.0f} images/s"


class RunningMetrics:
    """Loss, correct predictions and images of an epoch, summed on the device and read now and then.

    The sums continue from those in ``state``, and :meth:`flush` writes them back for checkpoints.
    """

    def __init__(self, state: TrainState, device: torch.device, world: World):
        # with float64 the sums do not depend on where a training was interrupted; MPS has none
        kind = torch.float32 if device.type == "mps" else torch.float64
        self._state, self._world = state, world
        self._sums = torch.tensor([state.loss_sum, state.correct], dtype=kind, device=device)
        self._pending: list[tuple[Tensor, Tensor, Tensor, int]] = []
        self.images = 0  # of this epoch, in this process

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor, count: int) -> None:
        """Add a batch.

        The batch is stored until the next read: within a step, whose convolutions have emptied the caches, each small
        operation takes five times as long as in a row of them.

        Args:
            loss: Mean loss of the batch, on all ranks.
            logits: Logits (N, K) of this rank's images.
            labels: Labels (N,) or probabilities (N, K) of this rank's images.
            count: Number of images of the batch, on all ranks.
        """
        self._pending.append((loss, logits, labels, count))
        self._state.seen += count
        self.images += count

    def compute(self) -> tuple[float, float]:
        """Return mean loss and accuracy of the epoch so far."""
        self.flush()
        return self._state.loss_sum / self._state.seen, self._state.correct / self._state.seen

    def reset(self) -> None:
        """Start another epoch."""
        self._sums.zero_()
        self._state.loss_sum, self._state.correct, self._state.seen = 0.0, 0, 0
        self.images = 0

    @torch.no_grad()
    def flush(self) -> None:
        """Write the sums to the state; an accelerator waits.

        The stored batches are added one by one, so that the sums do not depend on when they are read.
        """
        if not self._pending:
            return
        correct = torch.stack([count_correct(logits, labels) for _, logits, labels, _ in self._pending])
        images = torch.tensor([float(len(logits)) for _, logits, _, _ in self._pending], device=correct.device)
        self._world.all_reduce_mean([correct, images], 1)
        for (loss, _, _, count), accuracy in zip(self._pending, correct / images, strict=True):
            self._sums += torch.stack([loss * count, (accuracy * count).round()])
        self._pending.clear()
        self._state.loss_sum, self._state.correct = self._read()

    def _read(self) -> tuple[float, int]:
        loss, correct = self._sums.tolist()
        return loss, int(correct)


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the number of correct predictions among logits (N, K), given labels (N,) or probabilities (N, K)."""
    target = labels if labels.dim() == 1 else labels.argmax(dim=1)
    return (logits.argmax(dim=1) == target).sum(dtype=torch.float32)
