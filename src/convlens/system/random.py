"""Seeds that are functions of (seed, epoch, step), and the state of random generators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


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
def preserve_rng_state() -> Iterator[None]:
    """Leave PyTorch's random numbers and threads as they were, whatever a training in Python does to them."""
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # named, or PyTorch warns of several
            yield
    finally:
        torch.set_num_threads(threads)


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed PyTorch's global generators of the CPU and of ``device``.

    torch.manual_seed seeds every kind of accelerator, and where there is none of a kind it keeps a note, with a
    stack trace, for the day one comes: a millisecond, and memory, at each call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
