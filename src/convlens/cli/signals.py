"""Reactions to Ctrl-C and SIGTERM."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn


def sigint_handler(message: str) -> Callable[..., NoReturn]:
    """Return a handler that prints ``message`` and exits at once, even within an import."""

    def leave(*_: object) -> NoReturn:
        print(f"convlens: {message}", file=sys.stderr, flush=True)
        os._exit(130)

    return leave


def exit_on_sigint() -> None:
    """Exit immediately on Ctrl-C; use only before anything has been written."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, sigint_handler("interrupted"))


def restore_sigint() -> None:
    """Raise KeyboardInterrupt on Ctrl-C again, so that half-written output is removed."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def graceful_stop(*, alone: bool = True, announce: bool = True) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns True once Ctrl-C or SIGTERM asked to stop; a second Ctrl-C interrupts.

    Args:
        alone: False for one of several processes: torchrun repeats the signal, which must not interrupt.
        announce: Print a message at the first signal.
    """
    asked = False

    def stop(*_: Any) -> None:
        nonlocal asked
        if asked and alone:
            raise KeyboardInterrupt
        if not asked and announce:
            print("stopping after this step ...", file=sys.stderr)
        asked = True

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
