"""Model selection and early stopping, by validation accuracy alone."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor, nn

from convlens.training.ema import EMA
from convlens.training.recipe import Recipe
from convlens.training.state import EpochRecord, TrainState


class BestWeights:
    """Weights of the best epoch, if the recipe's ``restore_best`` asks for them, and the recipe's ``patience``.

    Attributes:
        weights: Weights of the best epoch so far by name; empty without ``restore_best``.
    """

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self.weights: dict[str, Tensor] = {}

    def update(self, record: EpochRecord, state: TrainState, model: nn.Module) -> None:
        """Add the record of an epoch to the state, and compare it with the best; ``model`` has its weights."""
        state.records.append(record)
        if record.val_acc is None:
            return
        if is_best(record, state):
            state.best_epoch = record.epoch
            if self._recipe.restore_best:
                self.weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
        state.finished = 0 < self._recipe.patience <= record.epoch - state.best_epoch

    def restore(self, model: nn.Module, ema: EMA) -> None:
        """Give the model its final weights: those of the best epoch, else the averaged ones, else its own."""
        model.load_state_dict({**model.state_dict(), **ema.weights, **self.weights})


def is_best(record: EpochRecord, state: TrainState) -> bool:
    """Return True if ``record`` has the best validation accuracy so far; a tie goes to the lower loss."""
    if not state.best_epoch:
        return True
    best = asdict(state.records[state.best_epoch - 1])
    return (record.val_acc or 0, -(record.val_loss or 0)) > (best["val_acc"], -best["val_loss"])
