"""How the trials of a sweep are done: one after another, by any number of processes that share the study.

Run as a module it is one of those processes: ``python -m convlens.sweep.worker FOLDER THREADS``.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from convlens.data.loader import count_batches
from convlens.errors import TrainingInterruptedError
from convlens.sweep.study import Sweep
from convlens.system.device import set_num_threads
from convlens.system.hardware import available_cores
from convlens.system.random import derive_seed
from convlens.training.build import drop_unsupported_options, make_model, model_config
from convlens.training.callbacks import Callback, ProgressBarCallback, StopWhen
from convlens.training.loop import fit
from convlens.training.recipe import Recipe
from convlens.training.state import EpochRecord

HEARTBEAT_SECONDS = 20.0  # seconds between the signs of life of a process that is at a trial

GRACE = 180.0  # seconds without one, and it is taken for dead

REGISTRATION_GRACE_SECONDS = 10.0  # seconds that a process may take from taking a trial to putting its name to it

MAX_RETRIES = 3  # a trial whose process died so often is given up: it may be the cause

POLL = 0.5  # seconds


def process_name(pid: int | str = "self") -> str | None:
    """Return what names a process for good: machine and its start, process and its start; None if there is none.

    Where the system does not tell (not Linux), processes look alike to others until they give no sign of life.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            place = f"{file.read()[:8]} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            number, _, rest = file.read().partition(" ")
    except OSError:
        return None
    state, started = (rest.rpartition(")")[2].split()[i] for i in (0, 19))
    return None if state == "Z" else f"{socket.gethostname()} {place} {number} {started}"


def is_gone(name: str) -> bool:
    """Say whether the process of this name was on this machine and is there no more."""
    mine = process_name() or ""
    here = name.rsplit(" ", 2)[0] == mine.rsplit(" ", 2)[0] and mine.count(" ") >= 4
    return here and process_name(name.split(" ")[-2]) != name


class TrialTracker:
    """Those who work on a study: which trials count, and which have lost their process."""

    def __init__(self, study: optuna.Study):
        self.study = study
        self._signs: dict[int, tuple[Any, float]] = {}  # trial -> its last sign of life, and when it was first seen

    def trials(self) -> list[FrozenTrial]:
        """Return all trials, as they are now."""
        return self.study.get_trials(deepcopy=False)

    def done(self) -> list[FrozenTrial]:
        """Return the trials that have come to an end; those that were put back do not count."""
        cut, ended = self.study.user_attrs, [trial for trial in self.trials() if trial.state.is_finished()]
        again = {t.number for t in ended if t.state is TrialState.FAIL and cut.get(cut_short(t), {}).get("again")}
        return [trial for trial in ended if trial.number not in again]

    def running(self) -> list[FrozenTrial]:
        """Return the trials under way, once those whose process is gone have been put back."""
        alive = []
        for trial in self.trials():
            if trial.state is TrialState.RUNNING:
                if self.is_lost(trial):
                    deaths = trial.user_attrs.get("deaths", 0) + 1
                    requeue(self.study, trial, "its process is gone", deaths)
                else:
                    alive.append(trial)
        return alive

    def is_lost(self, trial: FrozenTrial) -> bool:
        """Say whether the process at a trial is gone, or has given no sign of life while this one looked on."""
        sign, now = trial.user_attrs.get("alive"), time.monotonic()
        if self._signs.get(trial.number, (None, now))[0] != sign or trial.number not in self._signs:
            self._signs[trial.number] = (sign, now)
        worker = trial.user_attrs.get("worker")
        silent = now - self._signs[trial.number][1]
        return silent > REGISTRATION_GRACE_SECONDS if worker is None else is_gone(worker) or silent > GRACE


def requeue(study: optuna.Study, trial: FrozenTrial | Trial, reason: str, deaths: int = 0) -> None:
    """End a trial that was cut short, and put its values back in line; give it up if it has killed its processes."""
    given_up = deaths >= MAX_RETRIES
    # kept with the study, for another process's trial takes no notes
    study.set_user_attr(cut_short(trial), {"reason": reason, "again": not given_up})
    with contextlib.suppress(UpdateFinishedTrialError, ValueError):  # another process was quicker
        study.tell(trial.number, state=TrialState.FAIL)
        if not given_up:
            study.enqueue_trial(trial.params, user_attrs={"deaths": deaths})


def cut_short(trial: FrozenTrial | Trial) -> str:
    """Return the name under which a study keeps why a trial was cut short."""
    return f"cut short {trial.number}"


def resolve(sweep: Sweep, params: dict[str, Any], threads: int = 0) -> Recipe:
    """Return the recipe of a trial; ``threads`` (0: as many as it says) is all that it may compute with."""
    recipe = drop_unsupported_options(sweep.base.override(**params), asked=())
    most = threads or available_cores()
    return recipe.override(threads=min(recipe.threads or most, most))


def share_of_cores(jobs: int) -> int:
    """Return the threads for each of ``jobs`` processes on this machine."""
    return max(available_cores() // jobs, 1)


def train_trial(
    sweep: Sweep, recipe: Recipe, should_stop: Callable[[], bool] = lambda: False, show_progress: bool = False
) -> Iterator[EpochRecord]:
    """Train once, as ``convlens train`` does, but leave nothing on disk; the test split is not even there."""
    set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    net = make_model(model_config(recipe, sweep.data), sweep.data, sweep.preprocess)
    callbacks: list[Callback] = [StopWhen(should_stop), *([ProgressBarCallback()] if show_progress else [])]
    return fit(net, sweep.data, recipe, preprocess=sweep.preprocess, callbacks=callbacks)


def run_trial(
    sweep: Sweep, trial: Trial, threads: int, should_stop: Callable[[], bool], between: Callable[[], None], show: bool
) -> None:
    """Do one trial: report every epoch, stop early if it lags behind, write down how it ended."""
    study, started, beat, epochs = sweep.study, time.perf_counter(), 0.0, 0

    def stop_or_beat() -> bool:
        nonlocal beat
        if time.monotonic() - beat > HEARTBEAT_SECONDS:
            beat = time.monotonic()
            trial.set_user_attr("alive", beat)
        return should_stop()

    def end(state: TrialState, value: float | None = None, **told: Any) -> None:
        with contextlib.suppress(UpdateFinishedTrialError):  # it was taken for dead, and another process has done it
            told |= {"epochs": epochs, "seconds": round(time.perf_counter() - started, 3)}
            for key, found in told.items():
                trial.set_user_attr(key, found)
            study.tell(trial, value, state, skip_if_finished=True)

    accuracy, loss = -1.0, 0.0
    try:
        trial.set_user_attr("worker", process_name())
        recipe = resolve(sweep, trial.params, threads)
        steps = count_batches(len(sweep.data.train), recipe.batch_size)
        last = math.ceil(recipe.total_steps(steps) / steps) if recipe.max_seconds is None else 0
        for record in train_trial(sweep, recipe, stop_or_beat, show):
            assert record.val_acc is not None and record.val_loss is not None  # the data have a validation split
            epochs = record.epoch
            better = (record.val_acc, -record.val_loss) > (accuracy, -loss)
            if not recipe.restore_best or better:  # its weights are kept
                accuracy, loss = record.val_acc, record.val_loss
            trial.report(record.val_acc, epochs)
            between()
            if epochs != last and trial.should_prune():
                end(TrialState.PRUNED)
                return
        end(TrialState.COMPLETE, accuracy, val_loss=loss)
    except (TrainingInterruptedError, KeyboardInterrupt) as error:
        requeue(study, trial, "interrupted", trial.user_attrs.get("deaths", 0))
        raise TrainingInterruptedError("interrupted") from error
    except UpdateFinishedTrialError:  # it was taken for dead
        return
    except Exception as error:  # whatever it is: one trial has failed, and the sweep goes on
        end(TrialState.FAIL, reason=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def run_worker(
    sweep: Sweep,
    *,
    threads: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    between: Callable[[], None] = lambda: None,
    helper: bool = False,
    show_progress: bool = False,
) -> None:
    """Take trials until as many as planned are done, by whomever; wait for the last ones of others.

    ``between`` is called after each epoch, and while it waits. Raises Interrupted when ``should_stop`` says so; the
    trial under way is put back in line.
    """
    study, crew = sweep.study, TrialTracker(sweep.study)
    distributions = {name: values.distribution() for name, values in sweep.space.items()}
    while True:
        if should_stop():
            raise TrainingInterruptedError("interrupted")
        done, running = len(crew.done()), len(crew.running())
        between()
        if done >= sweep.plan["trials"]:
            return
        if done + running >= sweep.plan["trials"]:
            time.sleep(POLL)  # if one of them is lost, it is to be done again
            continue
        # drawn anew for each trial, so that a sweep by one process gives the same trials however often it is stopped;
        # those who work at the same time must not draw the same
        company = (os.getpid(),) if helper or running else ()
        seed = derive_seed(sweep.base.seed, done, *company) % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=seed)
        trial = study.ask(distributions)
        run_trial(sweep, trial, threads, should_stop, between, show_progress)


@contextlib.contextmanager
def helpers(sweep: Sweep, count: int, threads: int, warn: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Let ``count`` other processes work on the sweep inside the block; at its end they stop, and their trials wait.

    The block gets a function to call now and then: it warns, once, of each that has died by itself.
    """
    # -P: no module of the folder that we are in
    command = [sys.executable, "-P", "-m", "convlens.sweep.worker", str(sweep.folder), str(threads)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(count)]
    dead: set[int] = set()

    def look() -> None:
        for process in processes:
            if process.poll() and process.pid not in dead:  # 0: it found nothing more to do
                dead.add(process.pid)
                warn(f"a helper process has died (exit code {process.returncode}); the sweep goes on without it")

    try:
        yield look
        look()
    finally:
        for process in processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()  # which they take for the end, however this process came to its own
        for process in processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def worker_main(folder: str, threads: str) -> None:
    """Be a helper: work on the sweep until it is done, or until the process that started this one is gone."""
    import signal

    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())

    def wait_for_the_end() -> None:
        while os.read(0, 1024):  # not through sys.stdin, whose lock would be held when this process ends
            pass
        stopping.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    with contextlib.suppress(TrainingInterruptedError):
        run_worker(Sweep.resume(Path(folder)), threads=int(threads), should_stop=stopping.is_set, helper=True)


if __name__ == "__main__":
    worker_main(*sys.argv[1:])
