"""What this machine has, and how processes of convlens know each other. Without PyTorch."""

from __future__ import annotations

import contextlib
import os
import platform

OWN_LAUNCHER = "CONVLENS_LAUNCHER"  # names the process that has started this one

OWN_JOB = "convlens-"  # what the names of jobs that convlens has started begin with


def available_cores() -> int:
    """Return the number of CPU cores this process may use (containers often get fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_size() -> int:
    """Return the bytes of memory that this machine has, or that this container may use; 0 where it is not told."""
    sizes = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max", encoding="utf-8") as limit:
        sizes.append(int(limit.read()))
    return min(sizes, default=0)


def processor_name() -> str:
    """Return the processor's name where the system tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def has_bf16() -> bool:
    """Say whether the processor has instructions for bf16, as far as the system tells."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        return any("bf16" in line for line in lines if line.startswith(("flags", "Features")))
    return False


def processes_here() -> int:
    """Return how many processes of this training share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
