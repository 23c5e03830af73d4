"""What Ctrl-C and SIGTERM do."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn


def sigint_handler(message: str) -> Callable[..., NoReturn]:
    """Return what to do at Ctrl-C while nothing is at stake, such as an import that must not be cut in two: leave."""

    def leave(*_: object) -> NoReturn:
        print(f"convlens: {message}", file=sys.stderr, flush=True)
        os._exit(130)

    return leave


def exit_on_sigint() -> None:
    """Let Ctrl-C end all at once, as long as nothing is at stake."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, sigint_handler("interrupted"))


def restore_sigint() -> None:
    """Let Ctrl-C end in KeyboardInterrupt from here on: PyTorch is imported, and what is half done is cleared away."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def graceful_stop(*, alone: bool = True, told: bool = True) -> Iterator[Callable[[], bool]]:
    """Give a function that says whether Ctrl-C was pressed, or a polite kill came; a second time stops at once.

    Not so with ``alone=False``: torchrun asks each of its processes again. ``told`` says that it was heard.
    """
    asked = False

    def stop(*_: Any) -> None:
        nonlocal asked
        if asked and alone:
            raise KeyboardInterrupt
        if not asked and told:
            print("stopping after this step ...", file=sys.stderr)
        asked = True

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
