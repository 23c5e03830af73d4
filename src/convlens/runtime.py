"""What a run computes on, and with: device, threads, and seeds that are functions of (seed, epoch, step)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator, Mapping

import torch

from convlens.errors import UsageError
from convlens.machine import available_cores, processor_name
from convlens.ranks import join, processes_here

DEVICES = ("auto", "cpu", "cuda", "mps")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called ``name``; ``auto`` takes CUDA, then Apple's MPS, then the CPU.

    Where several processes train together, CUDA counts only if there is a device for each. Raises UsageError for an
    unknown name and for a device that this machine does not have.
    """
    if name not in DEVICES:
        raise UsageError(f"unknown device {name!r}; choose from: {', '.join(DEVICES)}")
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and torch.cuda.device_count() >= processes_here(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available[name]:
        each = f" for each of {processes_here()} processes" if processes_here() > 1 else ""
        raise UsageError(f"this machine has no {name} device{each}; use --device auto or --device cpu")
    return torch.device(name)


def use_threads(count: int = 0) -> int:
    """Let PyTorch compute with ``count`` CPU threads; return the number.

    0 is all cores this process may use, or its share of them where several processes train together.
    """
    if not 0 <= count <= available_cores():
        raise UsageError(f"--threads is {count}; this machine lets convlens use 1 to {available_cores()} (0: all)")
    torch.set_num_threads(count or max(available_cores() // processes_here(), 1))
    return torch.get_num_threads()


def keep_memory() -> None:
    """Let this process keep the memory that it frees, for what it needs next; only on Linux with glibc.

    Each step of a training needs the same hundreds of megabytes, and frees them. Where they go back to the system, and
    come from it anew page by page, that is 5 to 20% of the step. Who has set malloc's own variables is not overruled.
    """
    ask_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})  # all comes from the heap, and stays there


def return_memory() -> None:
    """Take back what :func:`keep_memory` asked for, and give the system what nothing uses.

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


def derive_seed(*numbers: int) -> int:
    """Mix whole numbers, such as (seed, epoch, step), into one 63-bit seed.

    SplitMix64's finaliser (Steele, Lea, Flood 2014) after each number: neighbouring inputs give unrelated
    seeds, and equal inputs give the same seed on every machine.
    """
    mask, state = (1 << 64) - 1, 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


@contextlib.contextmanager
def callers_state_kept() -> Iterator[None]:
    """Leave PyTorch's random numbers and threads as they were, whatever a training in Python does to them."""
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # named, or PyTorch warns of several
            yield
    finally:
        torch.set_num_threads(threads)


def seed_global(seed: int, device: torch.device) -> None:
    """Seed PyTorch's global generators of the CPU and of ``device``.

    torch.manual_seed seeds every kind of accelerator, and where there is none of a kind it keeps a note, with a
    stack trace, for the day one comes: a millisecond, and memory, at each call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """Say what a run ran on: processor or accelerator, cores, threads, processes, Python, PyTorch."""
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name() if device.type == "cuda" else processor_name(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),  # of each process
        "processes": join().size,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
