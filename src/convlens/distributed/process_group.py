"""The processes that train one net together, as torchrun starts them; a training in one process is one of one."""

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

TRAININGS = itertools.count(1)  # that this process has begun

TIMEOUT_SECONDS = datetime.timedelta(hours=1)  # for the slowest of them: the first one tests alone, and may download


class World:
    """One process among those that train together: its rank, from 0, and how many they are.

    Alone, every method does nothing, so nobody need ask. All of them must call the same methods in the same order. If
    one has died, the others get WorkerLostError.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, again: bool = False):
        self.rank, self.size = rank, size
        self.first = rank == 0  # the one that writes
        self.again = again  # some may take the place of others that have died

    def part(self, count: int) -> slice:
        """Return which of the ``count`` images of a batch are this rank's: neighbours stay together in twos.

        Where that would leave a rank fewer than two, which BatchNorm cannot learn from, each takes all of them.
        """
        if self.size == 1 or count < 2 * self.size:
            return slice(0, count)
        start, end = (2 * (count // 2 * rank // self.size) for rank in (self.rank, self.rank + 1))
        return slice(start, count if self.rank + 1 == self.size else end)

    def average(self, tensors: Sequence[Tensor], count: int) -> None:
        """Make each of ``tensors`` its mean over the images of all ranks, in place; ``count`` of them are here."""
        if self.size == 1:
            return
        parts = [tensor.detach().reshape(-1).float() for tensor in tensors]
        total = torch.cat([*parts, parts[0].new_ones(1)]).mul_(count)
        self._add_up(total)
        total /= total[-1].clone()
        for tensor, mean in zip(tensors, torch.split(total[:-1], [len(part) for part in parts]), strict=True):
            tensor.detach().copy_(mean.view_as(tensor))

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """Return the rows of all ranks, (count, ...), from those of this rank's :meth:`part`."""
        mine = self.part(count)
        if mine == slice(0, count):
            return rows
        whole = rows.new_zeros(count, *rows.shape[1:])
        whole[mine] = rows
        self._add_up(whole)
        return whole

    def agree(self, stop: bool, seconds: float) -> tuple[bool, float]:
        """Return whether any of them wants to stop, and the first one's clock."""
        if self.size == 1:
            return stop, seconds
        told = torch.tensor([stop, seconds if self.first else 0.0], dtype=torch.float64)
        self._add_up(told)
        return bool(told[0]), float(told[1])

    def share(self, content: Any) -> Any:
        """Return what the first one has to say: anything that is JSON. What the others bring is not looked at."""
        if self.size == 1:
            return content
        text = json.dumps(content).encode() if self.first else b""
        length = torch.tensor([len(text)])
        self._add_up(length)
        letters = torch.zeros(int(length), dtype=torch.uint8)
        if self.first:
            letters.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self._add_up(letters)
        return json.loads(letters.numpy().tobytes())

    def lead(self, content: Any) -> None:
        """Tell the others, who :meth:`follow`, what is to be done."""
        self.share({"do": content})

    def follow(self) -> Any:
        """Return what the first one tells to do; WorkerLostError if it could not make out what."""
        told = self.share(None)
        if "do" not in told:
            raise WorkerLostError(told["failed"])
        return told["do"]

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Inside the block the first one makes out what is to be done; if it cannot, the others hear of it."""
        try:
            yield
        except WorkerLostError:
            raise
        except Exception as error:
            self.share({"failed": str(error)})
            raise

    def equalise(self, net: nn.Module) -> None:
        """Give the nets of all ranks the first one's weights."""
        if self.size == 1:
            return
        for value in net.state_dict().values():
            with translate_peer_failure():
                distributed().broadcast(value, 0)

    def require_same(self, number: int, what: str) -> None:
        """Raise ConvlensError if ``number``, which is ``what``, is another here than on the first one."""
        if (first := self.share(number)) != number:
            raise ConvlensError(
                f"{what}: {number} for process {self.rank}, {first} for the first; all must see the same folders"
            )

    def _add_up(self, tensor: Tensor) -> None:
        """Make ``tensor`` the sum of those of all ranks, in place."""
        with translate_peer_failure():
            distributed().all_reduce(tensor)


@contextlib.contextmanager
def translate_peer_failure() -> Iterator[None]:
    """Raise WorkerLostError where PyTorch says, in many words, that another process has gone away."""
    try:
        yield
    except RuntimeError as error:
        raise WorkerLostError("another process of this training has stopped, or cannot be reached") from error


def distributed() -> Any:
    """Return torch.distributed, whose import takes a second that one process alone need not spend."""
    import torch.distributed

    return torch.distributed


@functools.cache
def init_world() -> World:
    """Return this process's place among those that torchrun has started with it; it is alone if it was not torchrun."""
    # a job of convlens.distributed.launcher has a name that no other has, so a run by that name is its own
    own = os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(OWN_JOB)
    again = own or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return World(again=again)
    if not distributed().is_initialized():
        backend = "gloo"
        if torch.cuda.device_count() >= processes_here():  # NCCL wants one for each
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
    ranks = World(distributed().get_rank(), distributed().get_world_size())
    ranks.again, _ = ranks.agree(again, 0.0)  # torchrun tells only those on the machine where one has died
    return ranks


def rendezvous(store: Any, rank: int, size: int) -> str:
    """Return a prefix of keys that all ranks agree on, and that those of an earlier start did not.

    torchrun keeps one store over all its restarts (PyTorch's issue 135712), where the processes would find addresses of
    the dead. So each asks with a nonce, and takes the answer to that; the first one answers until all have heard it.
    Raises WorkerLostError if one of them does not come within an hour.
    """
    nonce, end = uuid.uuid4().hex, time.monotonic() + TIMEOUT_SECONDS.total_seconds()

    def pause() -> None:  # waiting in the store itself, nobody would hear Ctrl-C
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
    """Raise UsageError if this is one of several processes, where ``what`` is for one."""
    if init_world().size > 1:
        raise UsageError(f"{what} cannot be shared by several processes: start it without torchrun")


def launch_id() -> str | None:
    """Return a name of the training that torchrun has started, the same after a restart; None without torchrun.

    A script that trains several nets gets another name each time.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name == "none":  # what torchrun calls a job without --rdzv-id: one for each first machine
        name = f"none {os.environ.get('MASTER_ADDR')}"
    return None if name is None else f"{name} {next(TRAININGS)}"


def launcher_start_time() -> float:
    """Return the time (of time.time) at which the process that started this one began, as far as the system tells."""
    try:
        # behind the name, which may hold anything, the 20th figure: clock ticks from the machine's start
        ticks = int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, IndexError, OSError, ValueError):
        return 0.0


def launcher_died() -> bool:
    """Say whether this process was started by convlens.distributed.launcher, and that is gone."""
    started = os.environ.get(OWN_LAUNCHER)
    return started is not None and os.getppid() != int(started)
