"""When memory runs out: a batch goes through the net in parts whose gradients add up, so the effective batch stays."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from convlens.system.memory import release_memory

Step = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def accumulate_gradients(
    step: Step, restart: Callable[[], None], images: Tensor, labels: Tensor, parts: int, *, again: bool = True
) -> tuple[Tensor, Tensor, int]:
    """Run ``step`` on the images (N, ...) in ``parts``; return its mean loss, all logits (N, K), and how many parts.

    ``step`` takes images, labels and their share of the batch, adds to the gradients, and returns (loss, logits).
    Where memory does not suffice for it, ``restart`` forgets the gradients, and all is done again in twice as many
    parts, which is said once; unless it may not be done ``again``, since other processes take part. What this process
    kept goes back to the system before. BatchNorm measures each part by itself. The error is raised again if there is
    not enough for two images at a time. The attempt that failed has moved BatchNorm's running statistics, and the
    random numbers of dropout, by what it got through.
    """
    asked = parts
    while True:
        losses, logits = [], []  # first, so that nothing of an attempt that failed is held on to
        restart()
        if parts > asked and images.device.type == "cpu":
            release_memory()
        try:
            # of a small last batch, no part of one image, which BatchNorm cannot learn from
            count = max(min(parts, len(images) // 2), 1)
            if count == 1:
                return *step(images, labels, 1.0), parts
            for x, y in zip(images.tensor_split(count), labels.tensor_split(count), strict=True):
                share = len(x) / len(images)
                loss, output = step(x, y, share)
                losses.append(loss * share)
                logits.append(output)
        except (RuntimeError, MemoryError) as error:
            if not again or not is_out_of_memory(error) or len(images) // (2 * parts) < 2:
                raise
            parts *= 2
            continue  # the error, which holds on to what filled the memory, is forgotten before the next attempt
        if parts > asked:
            print(
                f"convlens: not enough memory for {len(images)} images at once; from here on each step goes through "
                f"the net in {parts} parts, and learns from all of them together",
                file=sys.stderr,
            )
        return torch.stack(losses).sum(), torch.cat(logits), parts


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is that of an allocation, of Python, of PyTorch on a CPU, or on an accelerator."""
    # Apple's, Windows' and Linux' words, then those of C++ and of oneDNN, whose convolutions need memory of their own
    told = ("out of memory", "not enough memory", "can't allocate memory", "bad_alloc", "could not create a ")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in told)
