"""The process group of a training, as torchrun starts it; without torchrun a group of one."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import itertools
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convlens.errors import ConvlensError, UsageError, WorkerLostError
from convlens.system.hardware import OWN_JOB, OWN_LAUNCHER, processes_here

LAUNCHES = itertools.count(1)  # trainings that this process has started

TIMEOUT_SECONDS = datetime.timedelta(hours=1)  # for the slowest rank: rank 0 evaluates alone, and may download


class World:
    """The processes that train together, seen from one of them.

    With a world size of 1 every method is a no-op, so callers need no special case. All ranks must call the same
    methods in the same order. If a rank dies, the methods raise WorkerLostError on the others.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        is_main: True on rank 0, which alone writes files.
        is_restart: True if this group may replace one that died, so an interrupted run should be resumed.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, is_restart: bool = False):
        self.rank, self.size = rank, size
        self.is_main = rank == 0
        self.is_restart = is_restart

    def local_slice(self, count: int) -> slice:
        """Return the rows of a batch of ``count`` images that this rank works on; pairs of neighbors stay together.

        If a rank would get fewer than two images, from which BatchNorm cannot learn, every rank takes all of them.
        """
        if self.size == 1 or count < 2 * self.size:
            return slice(0, count)
        start, end = (2 * (count // 2 * rank // self.size) for rank in (self.rank, self.rank + 1))
        return slice(start, count if self.rank + 1 == self.size else end)

    def all_reduce_mean(self, tensors: Sequence[Tensor], count: int) -> None:
        """Replace each tensor, in place, by its mean over the ranks, weighted by ``count``: the images of this rank."""
        if self.size == 1:
            return
        parts = [tensor.detach().reshape(-1).float() for tensor in tensors]
        total = torch.cat([*parts, parts[0].new_ones(1)]).mul_(count)
        self._all_reduce_sum(total)
        total /= total[-1].clone()
        for tensor, mean in zip(tensors, torch.split(total[:-1], [len(part) for part in parts]), strict=True):
            tensor.detach().copy_(mean.view_as(tensor))

    def all_gather(self, rows: Tensor, count: int) -> Tensor:
        """Return the rows of all ranks, (count, ...), given those of this rank's :meth:`local_slice`."""
        mine = self.local_slice(count)
        if mine == slice(0, count):
            return rows
        whole = rows.new_zeros(count, *rows.shape[1:])
        whole[mine] = rows
        self._all_reduce_sum(whole)
        return whole

    def any(self, flag: bool) -> bool:
        """Return True if ``flag`` is True on at least one rank."""
        return self.any_with_clock(flag, 0.0)[0]

    def any_with_clock(self, flag: bool, seconds: float) -> tuple[bool, float]:
        """Return :meth:`any` of ``flag`` and the ``seconds`` of rank 0, in a single all-reduce."""
        if self.size == 1:
            return flag, seconds
        values = torch.tensor([flag, seconds if self.is_main else 0.0], dtype=torch.float64)
        self._all_reduce_sum(values)
        return bool(values[0]), float(values[1])

    def broadcast(self, content: Any) -> Any:
        """Return the ``content`` of rank 0, any JSON value; what other ranks pass is ignored."""
        if self.size == 1:
            return content
        text = json.dumps(content).encode() if self.is_main else b""
        length = torch.tensor([len(text)])
        self._all_reduce_sum(length)
        letters = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_main:
            letters.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self._all_reduce_sum(letters)
        return json.loads(letters.numpy().tobytes())

    def broadcast_plan(self, plan: Any) -> None:
        """Send ``plan``, a JSON value, from rank 0 to the ranks that wait in :meth:`receive_plan`."""
        self.broadcast({"plan": plan})

    def receive_plan(self) -> Any:
        """Return the plan of rank 0; WorkerLostError if rank 0 failed to make one."""
        message = self.broadcast(None)
        if "plan" not in message:
            raise WorkerLostError(message["error"])
        return message["plan"]

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """Make the plan on rank 0 inside the block; an exception is broadcast to the ranks that wait for the plan."""
        try:
            yield
        except WorkerLostError:
            raise
        except Exception as error:
            self.broadcast({"error": str(error)})
            raise

    def sync_parameters(self, model: nn.Module) -> None:
        """Copy parameters and buffers of rank 0's ``model`` to all ranks."""
        if self.size == 1:
            return
        for value in model.state_dict().values():
            with translate_peer_failure():
                distributed().broadcast(value, 0)

    def assert_same(self, number: int, what: str) -> None:
        """Raise ConvlensError if ``number``, which ``what`` describes, differs from that of rank 0."""
        if (first := self.broadcast(number)) != number:
            raise ConvlensError(
                f"{what}: {number} for process {self.rank}, {first} for the first; all must see the same folders"
            )

    def _all_reduce_sum(self, tensor: Tensor) -> None:
        """Replace ``tensor``, in place, by its sum over all ranks."""
        with translate_peer_failure():
            distributed().all_reduce(tensor)


@contextlib.contextmanager
def translate_peer_failure() -> Iterator[None]:
    """Raise WorkerLostError instead of PyTorch's long RuntimeError about a lost process."""
    try:
        yield
    except RuntimeError as error:
        raise WorkerLostError("another process of this training has stopped, or cannot be reached") from error


def distributed() -> Any:
    """Return torch.distributed, whose import takes a second that a single process should not spend."""
    import torch.distributed

    return torch.distributed


@functools.cache
def init_world() -> World:
    """Join the process group that torchrun has started; without torchrun, return a world of one process.

    Raises:
        UsageError: If RANK and WORLD_SIZE are set, but not the address of rank 0.
        WorkerLostError: If another process cannot be reached.
    """
    # the ID of a job of convlens.distributed.launcher is unique, so a run that carries it belongs to this job
    own = os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(OWN_JOB)
    is_restart = own or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return World(is_restart=is_restart)
    if not distributed().is_initialized():
        backend = "gloo"
        if torch.cuda.device_count() >= processes_here():  # NCCL needs one device per process
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
            raise UsageError(
                "RANK and WORLD_SIZE say that this is one of several processes, but MASTER_ADDR and MASTER_PORT are "
                "not set: start them with torchrun, or unset those two"
            )
        with translate_peer_failure():
            store, rank, size = next(distributed().rendezvous("env://", timeout=TIMEOUT_SECONDS))
            store = distributed().PrefixStore(rendezvous(store, rank, size), store)
            distributed().init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT_SECONDS)
        atexit.register(distributed().destroy_process_group)
    world = World(distributed().get_rank(), distributed().get_world_size())
    world.is_restart = world.any(is_restart)  # torchrun counts restarts only on the machine where a process died
    return world


def rendezvous(store: Any, rank: int, size: int) -> str:
    """Agree with all ranks on a key prefix that no earlier start of the same job has used.

    torchrun keeps one store over all its restarts (PyTorch issue 135712), which still holds the addresses of dead
    processes. So each rank asks with a nonce and takes the answer to that nonce; rank 0 answers until all have
    confirmed.

    Args:
        store: torch.distributed store that all ranks share.
        rank: Number of this process.
        size: Number of processes.

    Raises:
        WorkerLostError: If a rank does not appear within an hour.
    """
    nonce, end = uuid.uuid4().hex, time.monotonic() + TIMEOUT_SECONDS.total_seconds()

    def pause() -> None:  # polled: a wait inside the store would block Ctrl-C
        if time.monotonic() > end:
            raise WorkerLostError("another process of this training has not come")
        time.sleep(0.02)

    if rank > 0:
        store.set(f"convlens asks {rank}", nonce)
        while not store.check([f"convlens answers {nonce}"]):
            pause()
        prefix: str = store.get(f"convlens answers {nonce}").decode()
        store.set(f"convlens heard {prefix} {rank}", "")
        return prefix
    waiting = set(range(1, size))
    while waiting:
        pause()
        for other in sorted(waiting):
            if store.check([f"convlens asks {other}"]):
                store.set(f"convlens answers {store.get(f'convlens asks {other}').decode()}", nonce)
            if store.check([f"convlens heard {nonce} {other}"]):
                waiting.remove(other)
    return nonce


def require_single_process(what: str) -> None:
    """Raise UsageError if this is one of several processes; ``what`` names the task that needs a single one."""
    if init_world().size > 1:
        raise UsageError(f"{what} cannot be shared by several processes: start it without torchrun")


def launch_id() -> str | None:
    """Return an ID of the training that torchrun started, the same after a restart; None without torchrun.

    A script that trains several models gets another ID for each.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name == "none":  # torchrun's name of a job without --rdzv-id: one job per address of rank 0
        name = f"none {os.environ.get('MASTER_ADDR')}"
    return None if name is None else f"{name} {next(LAUNCHES)}"


def launcher_start_time() -> float:
    """Return the start time (as time.time) of the process that started this one; 0 if the system does not say."""
    try:
        # the 20th field after the name, which may hold any character: clock ticks since the machine's start
        ticks = int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, IndexError, OSError, ValueError):
        return 0.0


def launcher_died() -> bool:
    """Return True if convlens.distributed.launcher started this process and has ended since."""
    started = os.environ.get(OWN_LAUNCHER)
    return started is not None and os.getppid() != int(started)
