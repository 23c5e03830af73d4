"""How freed memory is kept for the next step (glibc), and given back."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h


def retain_freed_memory() -> None:
    """Let this process keep the memory that it frees, for what it needs next; only on Linux with glibc.

    Each step of a training needs the same hundreds of megabytes, and frees them. Where they go back to the system, and
    come from it anew page by page, that is 5 to 20% of the step. Who has set malloc's own variables is not overruled.
    """
    ask_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})  # all comes from the heap, and stays there


def release_memory() -> None:
    """Take back what :func:`retain_freed_memory` asked for, and give the system what nothing uses.

    Where memory has run out, what is kept stands in the way of all that does not come from malloc, such as the code
    that oneDNN writes for a convolution of a new size. Of addresses (``ulimit -v``) only those at the end come free.
    """
    # as malloc begins, but for good: large blocks are the system's own, and so is what is free at the heap's end
    ask_malloc({M_MMAP_MAX: 1 << 16, M_MMAP_THRESHOLD: 128 << 10, M_TRIM_THRESHOLD: 128 << 10})
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def ask_malloc(settings: Mapping[int, int]) -> None:
    """Set variables of glibc's malloc, by mallopt(3)."""
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # musl has none
        for variable, value in settings.items():
            mallopt(variable, value)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an allocation failed: Python's, PyTorch's on a CPU, or an accelerator's."""
    import torch

    # macOS, Windows and Linux; then C++ and oneDNN, whose convolutions allocate memory of their own
    messages = ("out of memory", "not enough memory", "can't allocate memory", "bad_alloc", "could not create a ")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in messages)
