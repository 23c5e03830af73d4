"""The clock of a training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from convlens.distributed.process_group import World
from convlens.training.state import TrainState


class TrainClock:
    """Keeps ``state.seconds`` (training steps only) and ``state.elapsed`` (everything) up to date.

    ``elapsed`` is that of rank 0 on all ranks, because the length of a training may depend on it.

    Args:
        state: State of the training; both times continue from its values.
        world: The processes that train together.
        now: Clock that returns seconds from an arbitrary origin.
    """

    def __init__(self, state: TrainState, world: World, now: Callable[[], float]):
        self._state, self._world, self._now = state, world, now
        self._origin = now() - state.elapsed
        self.start_epoch()

    def start_epoch(self) -> None:
        """Resume counting training time; what has passed since the last tick was something else."""
        self._last_tick = self._now()
        self.first_step, self._seconds_before = self._state.step, self._state.seconds

    @property
    def epoch_seconds(self) -> float:
        """Training time since :meth:`start_epoch`."""
        return self._state.seconds - self._seconds_before

    def tick(self, stop: bool = False) -> bool:
        """Update both times; return True if ``stop`` is True on at least one rank."""
        now = self._now()
        self._state.seconds += now - self._last_tick
        self._last_tick = now
        stop, self._state.elapsed = self._world.any_with_clock(stop, now - self._origin)
        return stop

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count the time inside the block as ``elapsed`` only, from the next tick on: it is not training."""
        self._state.seconds += self._now() - self._last_tick
        yield
        self._last_tick = self._now()
