"""Derive seeds from (seed, epoch, step), and manage the state of random generators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def derive_seed(*numbers: int) -> int:
    """Mix integers, such as (seed, epoch, step), into one 63-bit seed.

    Applies SplitMix64's finalizer (Steele, Lea, Flood 2014) after each number. Neighboring inputs give unrelated seeds,
    and equal inputs give the same seed on every machine.
    """
    mask, state = (1 << 64) - 1, 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


@contextlib.contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore PyTorch's random state and number of threads after the block."""
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(
            devices=range(torch.cuda.device_count())
        ):  # explicit, because PyTorch warns if there are several
            yield
    finally:
        torch.set_num_threads(threads)


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed PyTorch's global generators of the CPU and of ``device``.

    torch.manual_seed would seed every kind of accelerator, and record a stack trace for each kind that this machine
    lacks, which takes a millisecond and memory at each call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
