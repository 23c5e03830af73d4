"""Several processes for one training on this machine: what ``--processes`` does, by PyTorch's own torchrun."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid

import torch

from convlens.errors import UsageError, WorkerLostError
from convlens.system.hardware import OWN_JOB, OWN_LAUNCHER, available_cores

RESTARTS = 3

SAVING = 600  # seconds that the processes have to finish a step and save, when they are asked to stop


def launch(arguments: list[str], processes: int) -> int:
    """Run ``convlens ARGUMENTS`` in so many processes that train together; return the exit code.

    If one of them is killed, all are started again and go on from the last checkpoint, three times at most. What a
    person should read has been printed by the processes.
    """
    most = max(available_cores(), torch.cuda.device_count())
    if processes > most:
        raise UsageError(f"--processes is {processes}; this machine has cores or GPUs for {most}")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # what a process says of another that has gone away is no news
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ[OWN_LAUNCHER] = str(os.getpid())
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=f"{OWN_JOB}{uuid.uuid4().hex}",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, shutdown_timeout=SAVING,
    )  # fmt: skip
    for left in reversed(range(RESTARTS + 1)):
        try:
            elastic_launch(config, sys.executable)("-P", "-m", "convlens", *arguments)
            return 0
        except SignalException:  # they have been told, and have saved
            return 130
        except ChildFailedError as error:
            codes = [failure.exitcode for failure in error.failures.values()]
            told = [code for code in codes if code > 0 and code != WorkerLostError.exit_code]
            if told:
                return told[0]
            # those that were left have been asked to stop, with SIGTERM
            signals = [-code for code in codes if code < 0]
            number = next((n for n in signals if n != signal.SIGTERM), signal.SIGTERM)
            killed = f"a process was killed (signal {int(number)})"
            if not left:
                print(
                    f"convlens: {killed} for the {RESTARTS + 1}th time; is there too little memory? Go on from the "
                    "last checkpoint with --resume",
                    file=sys.stderr,
                )
                return 1
            print(f"convlens: {killed}; all go on from the last checkpoint", file=sys.stderr)
    raise AssertionError("unreachable")
