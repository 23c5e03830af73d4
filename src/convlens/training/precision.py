"""Precision of training: fp32, or bf16 where this machine computes it faster and right."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

import torch
from torch import nn

PROBES = 8
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
    x = torch.randn(16, 64, 14, 14, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)

    fastest, output = {"fp32": float("inf"), "bf16": float("inf")}, dict[str, torch.Tensor]()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other while another program is busy
    for _ in range(PROBES):  # in turn, and the fastest of each, for the same reason
        for precision in fastest:
            start = time.perf_counter()
            with torch.no_grad(), autocast(precision, device):
                output[precision] = conv(x)
            fastest[precision] = min(fastest[precision], time.perf_counter() - start)
    torch.set_num_threads(threads)
    error = (output["fp32"] - output["bf16"].float()).abs().max()
    right = bool(error <= PROBE_TOLERANCE * output["fp32"].abs().max())
    return "bf16" if right and fastest["bf16"] < 0.8 * fastest["fp32"] else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which convolutions and linear layers compute in ``precision``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
