"""Several processes for one training on this machine: what ``--processes`` does, by PyTorch's own torchrun."""

from __future__ import annotations

import logging
import os
import sys
import uuid

from convlens.errors import PeerGone
from convlens.ranks import OWN_JOB

RESTARTS = 3


def launch(arguments: list[str], processes: int) -> int:
    """Run ``convlens ARGUMENTS`` in so many processes that train together; return the exit code.

    If one of them is killed, all are started again and go on from the last checkpoint, three times at most. What a
    person should read has been printed by the processes.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # what a process says of another that has gone away is no news
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=f"{OWN_JOB}{uuid.uuid4().hex}",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
    )  # fmt: skip
    for left in reversed(range(RESTARTS + 1)):
        try:
            elastic_launch(config, sys.executable)("-P", "-m", "convlens", *arguments)
            return 0
        except SignalException:  # they have been told, and have saved
            return 130
        except ChildFailedError as error:
            codes = [failure.exitcode for failure in error.failures.values()]
            told = [code for code in codes if code > 0 and code != PeerGone.exit_code]
            if told or not left:
                return told[0] if told else 1
            print("convlens: a process was killed; all go on from the last checkpoint", file=sys.stderr)
    raise AssertionError("unreachable")
