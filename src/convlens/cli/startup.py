"""Start of the command: the clock of `--budget`, fast imports."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator

STARTED = time.perf_counter()  # `--budget` counts from here


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Disable garbage collection inside the block.

    Importing PyTorch creates half a million objects that never die; scanning them takes 0.2 s.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
