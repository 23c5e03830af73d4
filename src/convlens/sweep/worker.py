"""Run the trials of a sweep, in this process and in helper processes."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial, TrialState

from convlens.data.loader import count_batches
from convlens.data.preprocess import Preprocess
from convlens.errors import ConvlensError, TrainingInterruptedError
from convlens.sweep.storage import DATABASE_ERRORS, GRACE_SECONDS, MAX_RETRIES, retry_callback
from convlens.sweep.study import Sweep
from convlens.system.device import set_num_threads
from convlens.system.hardware import available_cores
from convlens.system.random import derive_seed
from convlens.training.build import drop_unsupported_options, make_model, model_config
from convlens.training.callbacks import Callback, ProgressBarCallback, StopWhen
from convlens.training.loop import fit
from convlens.training.recipe import Recipe

POLL_SECONDS = 0.5
EXIT_SECONDS = 30.0  # for a helper to stop


def repeated_trials(study: optuna.Study) -> set[int]:
    """Return the numbers of the trials that were cut short and queued again."""
    return {number for t in study.get_trials(deepcopy=False) for number in t.system_attrs.get("retry_history", ())}


def resolve(sweep: Sweep, params: dict[str, Any], threads: int = 0) -> Recipe:
    """Return the recipe of a trial, with at most ``threads`` threads (0: as many as the machine has cores)."""
    recipe = drop_unsupported_options(sweep.base.override(**params), asked=())
    most = threads or available_cores()
    return recipe.override(threads=min(recipe.threads or most, most))


@dataclass
class Worker:
    """Runs trials one after another, together with all other workers of the study."""

    sweep: Sweep
    threads: int = 0  # of a trial; 0: all cores
    should_stop: Callable[[], bool] = lambda: False  # called in every step; True interrupts the trial
    on_progress: Callable[[], None] = lambda: None  # called after every epoch, and while the worker waits
    show_progress: bool = False  # draw a progress bar
    is_helper: bool = False  # return as soon as no trial is left to start, without waiting for those of others
    count_helpers: Callable[[], int] = lambda: 0  # returns how many of its helper processes are running
    number: int | None = None  # of the trial under way

    def run(self) -> None:
        """Run trials until as many as planned have finished.

        Raises TrainingInterruptedError when ``should_stop`` returns True, with the trial queued again, and an error of
        Optuna or SQLAlchemy if a database cannot be reached for a minute.
        """
        reached = time.monotonic()
        while True:
            if self.should_stop():
                raise TrainingInterruptedError("interrupted")
            try:
                if not self._step():
                    return
                reached = time.monotonic()
            except DATABASE_ERRORS:  # the server may be restarting
                if time.monotonic() - reached > GRACE_SECONDS:
                    raise
                time.sleep(POLL_SECONDS)

    def _step(self) -> bool:
        """Run a trial, or wait for those of others; return False when nothing is left to do."""
        study, planned = self.sweep.study, self.sweep.plan["trials"]
        self._repeat_lost_trials()
        repeated, trials = repeated_trials(study), study.get_trials(deepcopy=False)
        done = sum(trial.state.is_finished() and trial.number not in repeated for trial in trials)
        running = sum(trial.state is TrialState.RUNNING for trial in trials)
        self.on_progress()
        if done + running < planned:
            # seeded by the number of finished trials: a resumed sweep draws what an uninterrupted one would; processes
            # that draw at the same time must not draw the same
            company = (os.getpid(),) if self.is_helper or running else ()
            study.sampler = optuna.samplers.TPESampler(seed=derive_seed(self.sweep.base.seed, done, *company) % 2**32)
            self._run_trial()
        elif self.is_helper or done >= planned:
            return False
        else:
            time.sleep(POLL_SECONDS)
        return True

    def _repeat_lost_trials(self) -> None:
        """Queue trials again whose process has died.

        A database knows them by their heartbeat. A journal file belongs to one command: between its own trials, and
        without helpers, every trial that is running is lost.
        """
        study = self.sweep.study
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental
            optuna.storages.fail_stale_trials(study)
        if self.sweep.plan["storage"] is None and not self.is_helper and not self.count_helpers():
            for trial in study.get_trials(states=(TrialState.RUNNING,)):  # copies, which the callback changes
                study.tell(trial.number, state=TrialState.FAIL)
                retry_callback(MAX_RETRIES)(study, trial)

    def _run_trial(self) -> None:
        """Run one trial; queue it again if it was interrupted, or its database was."""
        study, self.number = self.sweep.study, None
        try:
            self._optimize()
        except ValueError:  # from Optuna: another process took the trial for dead, and has ended it
            pass
        except (TrainingInterruptedError, KeyboardInterrupt, *DATABASE_ERRORS) as error:
            if self.number is not None and (trial := study.trials[self.number]).state is TrialState.FAIL:
                retry_callback(None)(study, trial)
            if isinstance(error, KeyboardInterrupt):
                raise TrainingInterruptedError("interrupted") from None
            raise

    def _optimize(self) -> None:
        """Let Optuna run one trial; raise the storage's own error if the storage fails when the trial ends."""
        try:
            self.sweep.study.optimize(self._objective, n_trials=1)
        except (AssertionError, UnboundLocalError) as error:  # Optuna 5 fails an assertion then
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, (*DATABASE_ERRORS, OSError)):
                cause = cause.__context__
            raise cause or error from None

    def _objective(self, trial: Trial) -> float:
        """Return the validation accuracy; NaN, which Optuna records as a failure, if the training failed."""
        self.number, started = trial.number, time.perf_counter()
        attributes: dict[str, Any] = {"worker": f"{socket.gethostname()} {os.getpid()}", "epochs": 0}
        try:
            params = {name: values.suggest(trial, name) for name, values in self.sweep.space.items()}
            return self._train(trial, resolve(self.sweep, params, self.threads), attributes)
        except (optuna.TrialPruned, TrainingInterruptedError, UpdateFinishedTrialError, *DATABASE_ERRORS):
            raise
        except Exception as error:  # one trial has failed; the sweep goes on
            attributes["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return math.nan
        finally:
            with contextlib.suppress(UpdateFinishedTrialError):
                for key, value in {**attributes, "seconds": round(time.perf_counter() - started, 3)}.items():
                    trial.set_user_attr(key, value)

    def _train(self, trial: Trial, recipe: Recipe, attributes: dict[str, Any]) -> float:
        """Train as ``convlens train`` does, but write nothing to disk; raise TrialPruned if the trial falls behind."""
        data = self.sweep.data
        set_num_threads(recipe.threads)
        torch.manual_seed(recipe.seed)
        preprocess = Preprocess.fit(data.train.images, data.input_style)
        model = make_model(model_config(recipe, data), data, preprocess)
        steps = count_batches(len(data.train), recipe.batch_size)
        last = math.ceil(recipe.total_steps(steps) / steps) if recipe.max_seconds is None else 0
        accuracy, loss = -1.0, 0.0
        callbacks: list[Callback] = [StopWhen(self.should_stop)]
        if self.show_progress:
            callbacks.append(ProgressBarCallback())
        for record in fit(model, data, recipe, preprocess=preprocess, callbacks=callbacks):
            assert record.val_acc is not None and record.val_loss is not None  # there is a validation split
            better = (record.val_acc, -record.val_loss) > (accuracy, -loss)
            if not recipe.restore_best or better:
                accuracy, loss = record.val_acc, record.val_loss
            attributes |= {"epochs": record.epoch, "val_loss": loss}
            trial.report(record.val_acc, record.epoch)
            self.on_progress()
            if record.epoch != last and trial.should_prune():
                raise optuna.TrialPruned
        return accuracy


@contextlib.contextmanager
def helper_processes(sweep: Sweep, count: int, threads: int) -> Iterator[Callable[[], int]]:
    """Let ``count`` other processes run trials inside the block; yield a function that returns how many still do.

    At the end of the block, or of this process, they stop, and queue their trials again.
    """
    spawn = multiprocessing.get_context("spawn")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for this process
    helpers = []
    for _ in range(count):
        reader, writer = spawn.Pipe(duplex=False)
        process = spawn.Process(target=helper_main, args=(sweep.folder, threads, reader), daemon=True)
        process.start()
        reader.close()
        helpers.append((process, writer))
    signal.signal(signal.SIGINT, before)
    try:
        yield lambda: sum(process.is_alive() for process, _ in helpers)
    finally:
        for _, writer in helpers:
            writer.close()
        for process, _ in helpers:
            process.join(EXIT_SECONDS)
            process.kill()


def helper_main(folder: Path, threads: int, parent: Connection) -> None:
    """Run trials until none is left to start, or the other end of ``parent`` is closed, however that happened."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        Worker(Sweep.resume(folder), threads, should_stop=parent.poll, is_helper=True).run()
    except TrainingInterruptedError:
        pass
    except (ConvlensError, OSError, *DATABASE_ERRORS) as error:
        sys.exit(f"convlens: {error}")
