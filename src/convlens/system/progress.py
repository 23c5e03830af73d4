"""Progress on standard error: a bar on a terminal, otherwise a line every 10 seconds; nothing for short tasks."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

QUIET_SECONDS = 2.0  # before anything is shown


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yield ``items``, and show progress and remaining time once they take more than 2 seconds."""
    with ProgressBar(what, total) as meter:
        for item in items:
            yield item
            meter.update(1)


class ProgressBar:
    """A progress display: ``with ProgressBar("reading", total) as bar: bar.update(n)``.

    Of nested bars only the outer one is shown, once it is visible.
    """

    _shown_one: ProgressBar | None = None

    def __init__(self, what: str, total: float, *, patience: float = QUIET_SECONDS, shown: bool = True):
        self.what, self.total = what, total
        self.done = 0.0
        self._start = self._shown = time.monotonic()
        self._patience = patience if shown else float("inf")
        self._bar: Any = None
        self._plain = not sys.stderr.isatty()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if ProgressBar._shown_one is self:
            ProgressBar._shown_one = None

    def update(self, amount: float, detail: str = "") -> None:
        """Add ``amount`` to the work that is done; ``detail`` is printed after the bar."""
        self.done += amount
        now = time.monotonic()
        if now - self._start < self._patience or ProgressBar._shown_one not in (None, self):
            return
        ProgressBar._shown_one = self
        if self._plain:
            if now - self._shown >= 10:
                self._shown = now
                left = (now - self._start) * (self.total - self.done) / (self.done or 1)
                percent = 100 * self.done / (self.total or 1)
                print(f"{self.what}: {percent:.0f}%, {left:.0f} s left" + f"; {detail}" * bool(detail), file=sys.stderr)
            return
        if self._bar is None:
            self._bar = self._make_bar()
            self._task = self._bar.add_task(self.what, total=self.total, detail="")
        self._bar.update(self._task, completed=self.done, detail=detail)

    def _make_bar(self) -> Any:  # rich is imported only when a bar is shown
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.table import Column

        console = Console(stderr=True)
        columns = [TextColumn("{task.description}"), TaskProgressColumn(), TimeRemainingColumn(compact=True)]
        if console.width >= 100:
            columns.insert(1, BarColumn(bar_width=24))
        rest = Column(ratio=1, no_wrap=True)  # cut off on a narrow terminal
        columns.append(TextColumn("{task.fields[detail]}", table_column=rest))
        bar = Progress(*columns, console=console, transient=True, expand=True)
        bar.start()
        return bar
