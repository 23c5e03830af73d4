"""Retain freed memory for the next step, and release it (glibc)."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h


def retain_freed_memory() -> None:
    """Retain freed memory in this process; only on Linux with glibc.

    Each training step allocates and frees the same hundreds of megabytes. Returning them to the system and getting them
    back page by page would take 5 to 20% of the step. Environment variables of malloc take precedence.
    """
    set_malloc_options({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})  # allocate on the heap, and never shrink it


def release_memory() -> None:
    """Undo :func:`retain_freed_memory`, and return unused memory to the system.

    When memory runs out, retained memory is not available to code that allocates without malloc, such as oneDNN when it
    generates code for a new convolution size. Under an address limit (``ulimit -v``) only the end of the heap is freed.
    """
    # malloc's initial values, but fixed: map large blocks separately, and trim the end of the heap
    set_malloc_options({M_MMAP_MAX: 1 << 16, M_MMAP_THRESHOLD: 128 << 10, M_TRIM_THRESHOLD: 128 << 10})
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def set_malloc_options(settings: Mapping[int, int]) -> None:
    """Set parameters of glibc's malloc with mallopt(3)."""
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # missing in musl
        for variable, value in settings.items():
            mallopt(variable, value)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an allocation failed: Python's, PyTorch's on a CPU, or an accelerator's."""
    import torch

    # macOS, Windows and Linux; then C++ and oneDNN, whose convolutions allocate memory of their own
    messages = ("out of memory", "not enough memory", "can't allocate memory", "bad_alloc", "could not create a ")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in messages)
