"""Select the device and the number of CPU threads."""

from __future__ import annotations

import platform

import torch

from convlens.distributed.process_group import init_world
from convlens.errors import UsageError
from convlens.system.hardware import available_cores, processes_here, processor_name

DEVICES = ("auto", "cpu", "cuda", "mps")


def select_device(name: str = "auto") -> torch.device:
    """Return a device by name; ``auto`` prefers CUDA, then Apple's MPS, then the CPU.

    For several training processes, CUDA is available only if there is a GPU for each.

    Raises:
        UsageError: The name is unknown, or this machine has no such device.
    """
    if name not in DEVICES:
        raise UsageError(f"unknown device {name!r}; choose from: {', '.join(DEVICES)}", field="device")
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and torch.cuda.device_count() >= processes_here(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available[name]:
        each = f" for each of {processes_here()} processes" if processes_here() > 1 else ""
        raise UsageError(f"this machine has no {name} device{each}; use `device=auto` or `device=cpu`", field="device")
    return torch.device(name)


def set_num_threads(count: int = 0) -> int:
    """Set PyTorch's number of CPU threads, and return it.

    Args:
        count: Number of threads; 0 uses all available cores, divided among the training processes of this machine.

    Raises:
        UsageError: There are not that many cores.
    """
    if not 0 <= count <= available_cores():
        raise UsageError(
            f"`threads` is {count}; this machine allows 1 to {available_cores()} (0: all)", field="threads"
        )
    torch.set_num_threads(count or max(available_cores() // processes_here(), 1))
    return torch.get_num_threads()


def system_info(device: torch.device) -> dict[str, str | int]:
    """Return device, cores, threads, processes and versions of this machine, for the record of a run."""
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
