"""Devices and CPU threads: what a run computes on, and how it is described."""

from __future__ import annotations

import platform

import torch

from convlens.distributed.process_group import init_world
from convlens.errors import UsageError
from convlens.system.hardware import available_cores, processes_here, processor_name

DEVICES = ("auto", "cpu", "cuda", "mps")


def select_device(name: str = "auto") -> torch.device:
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


def set_num_threads(count: int = 0) -> int:
    """Let PyTorch compute with ``count`` CPU threads; return the number.

    0 is all cores this process may use, or its share of them where several processes train together.
    """
    if not 0 <= count <= available_cores():
        raise UsageError(f"--threads is {count}; this machine lets convlens use 1 to {available_cores()} (0: all)")
    torch.set_num_threads(count or max(available_cores() // processes_here(), 1))
    return torch.get_num_threads()


def system_info(device: torch.device) -> dict[str, str | int]:
    """Say what a run ran on: processor or accelerator, cores, threads, processes, Python, PyTorch."""
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name() if device.type == "cuda" else processor_name(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),  # of each process
        "processes": init_world().size,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
