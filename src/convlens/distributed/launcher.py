"""Start several processes of one training on this machine, with PyTorch's torchrun."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid

import torch

from convlens.errors import UsageError, WorkerLostError
from convlens.system.hardware import OWN_JOB, OWN_LAUNCHER, available_cores

MAX_RESTARTS = 3
SHUTDOWN_SECONDS = 600  # for the processes to finish a step and save, when asked to stop

logger = logging.getLogger("convlens")


def launch(arguments: list[str], processes: int) -> int:
    """Run ``convlens ARGUMENTS`` in several processes that train together.

    If a process is killed, all are restarted and resume from the last checkpoint, at most three times. The processes
    print their own messages.

    Args:
        arguments: Command line without the program's name.
        processes: Number of processes.

    Returns:
        The exit code.

    Raises:
        UsageError: If the machine has fewer cores and fewer GPUs than ``processes``.
    """
    limit = max(available_cores(), torch.cuda.device_count())
    if processes > limit:
        raise UsageError(f"`processes` is {processes}; this machine has cores or GPUs for {limit}")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # silence the reports of processes that lost a peer: the launcher reports the loss itself
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ[OWN_LAUNCHER] = str(os.getpid())
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=f"{OWN_JOB}{uuid.uuid4().hex}",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, shutdown_timeout=SHUTDOWN_SECONDS,
    )  # fmt: skip
    for left in reversed(range(MAX_RESTARTS + 1)):
        try:
            elastic_launch(config, sys.executable)("-P", "-m", "convlens", *arguments)
            return 0
        except SignalException:  # the processes got the signal too, and have saved
            return 130
        except ChildFailedError as error:
            codes = [failure.exitcode for failure in error.failures.values()]
            errors = [code for code in codes if code > 0 and code != WorkerLostError.exit_code]
            if errors:
                return errors[0]
            # torchrun stops the surviving processes with SIGTERM, so another signal is the cause
            signals = [-code for code in codes if code < 0]
            number = next((n for n in signals if n != signal.SIGTERM), signal.SIGTERM)
            killed = f"a process was killed (signal {int(number)})"
            if not left:
                logger.warning(
                    "%s for the %dth time; is there too little memory? `resume` continues from the last checkpoint",
                    killed,
                    MAX_RESTARTS + 1,
                )
                return 1
            logger.warning("%s; all processes resume from the last checkpoint", killed)
    raise AssertionError("unreachable")
