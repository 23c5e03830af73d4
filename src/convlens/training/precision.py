"""Precision of training: fp32, or bf16 where this machine computes it faster and right."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

import torch
from torch import nn

PROBE_TOLERANCE = 0.02  # of the largest output; bf16 itself keeps about 3 digits


def choose_precision(name: str, device: torch.device) -> str:
    """Return "fp32" or "bf16"; ``auto`` tries both on a convolution and takes bf16 if it is faster and right."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device.type != "cpu":
        return "fp32"
    conv = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(64, 64, 14, 14, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)

    def seconds_of(precision: str) -> tuple[float, torch.Tensor]:
        best = float("inf")
        for _ in range(4):  # the first builds the kernel
            start = time.perf_counter()
            with torch.no_grad(), autocast(precision, device):
                y = conv(x)
            best = min(best, time.perf_counter() - start)
        return best, y.float()

    fp32, y32 = seconds_of("fp32")
    bf16, y16 = seconds_of("bf16")
    right = bool((y32 - y16).abs().max() <= PROBE_TOLERANCE * y32.abs().max())
    return "bf16" if right and bf16 < 0.8 * fp32 else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which convolutions and linear layers compute in ``precision``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
