"""What an epoch has come to so far: the sums on the device, and what is told of them now and then."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convlens.distributed.process_group import World
from convlens.training.state import TrainState


@dataclass(frozen=True)
class Progress:
    """Where a training stands in the middle of an epoch."""

    step: int
    total: int  # steps, as far as it is known
    epoch: float  # epochs that are done
    loss: float  # of this epoch so far
    accuracy: float
    images_per_second: float
    eta_seconds: float

    def __str__(self) -> str:
        figures = f"loss {self.loss:.4f}  accuracy {self.accuracy:.2%}  {self.eta_seconds:,.0f} s left in all"
        return f"{figures}  {self.images_per_second:,.0f} images/s"


class RunningMetrics:
    """Loss, hits and images of an epoch, added up on the device and read now and then."""

    def __init__(self, state: TrainState, device: torch.device, ranks: World):
        # float64 keeps the sums exact enough to be the same after a resume; MPS has none
        kind = torch.float32 if device.type == "mps" else torch.float64
        self._before = self._seen = state.seen  # an interrupted epoch's, by another process
        self._sums = torch.tensor([state.loss_sum, state.correct], dtype=kind, device=device)
        self._ranks = ranks
        self._waiting: list[tuple[Tensor, Tensor, Tensor, int]] = []

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, n: int) -> None:
        """Take the mean loss of a batch of ``n`` images, and this process's logits (N, K) and labels of it.

        They wait until somebody asks: within a step, whose convolutions have emptied the caches, each small operation
        takes five times as long as in a row of them.
        """
        self._waiting.append((loss, logits, labels, n))
        self._seen += n

    @torch.no_grad()
    def add_up(self) -> None:
        """Add what waits, batch by batch, so that the sums do not depend on when somebody asked."""
        if not self._waiting:
            return
        hits = torch.stack([count_correct(logits, labels) for _, logits, labels, _ in self._waiting])
        images = torch.tensor([float(len(logits)) for _, logits, _, _ in self._waiting], device=hits.device)
        self._ranks.average([hits, images], 1)
        for (loss, _, _, n), share in zip(self._waiting, hits / images, strict=True):
            self._sums += torch.stack([loss * n, (share * n).round()])
        self._waiting.clear()

    def read(self) -> tuple[float, int]:
        """Return the sum of the losses of all images so far, and how many were right: an accelerator is waited for."""
        self.add_up()
        loss, correct = self._sums.tolist()
        return loss, int(correct)

    def describe(self, state: TrainState, total: int, epoch_steps: int, seconds: float, left: float) -> Progress:
        """Return where the training stands, ``seconds`` into the epoch (or into its part that this process does)."""
        loss_sum, correct = self.read()
        pace = (self._seen - self._before) / max(seconds, 1e-9)
        loss, accuracy = loss_sum / self._seen, correct / self._seen
        return Progress(state.step, total, state.step / epoch_steps, loss, accuracy, pace, left)

    def store_into(self, state: TrainState) -> None:
        """Write the sums into the state that a checkpoint holds."""
        state.loss_sum, state.correct = self.read()
        state.seen = self._seen


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many images logits (N, K) have right, by labels (N,) or probabilities (N, K)."""
    target = labels if labels.dim() == 1 else labels.argmax(dim=1)
    return (logits.argmax(dim=1) == target).sum(dtype=torch.float32)
