"""CPU and memory of this machine, and the environment of launched processes. Must not import torch."""

from __future__ import annotations

import contextlib
import os
import platform

OWN_LAUNCHER = "CONVLENS_LAUNCHER"  # environment variable: process id of the launcher

OWN_JOB = "convlens-"  # prefix of the job ids of our own launcher


def available_cores() -> int:
    """Return the number of CPU cores this process may use (in containers often fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_size() -> int:
    """Return the memory of this machine or container in bytes; 0 if unknown."""
    sizes = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max", encoding="utf-8") as limit:
        sizes.append(int(limit.read()))
    return min(sizes, default=0)


def processor_name() -> str:
    """Return the name of the processor, or its architecture if the name is unknown."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def has_bf16() -> bool:
    """Return True if the processor is known to have bf16 instructions."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        return any("bf16" in line for line in lines if line.startswith(("flags", "Features")))
    return False


def processes_here() -> int:
    """Return the number of processes of this training on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
