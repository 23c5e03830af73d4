"""``convlens sweep``: search for a better recipe, and confirm it on fresh seeds."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convlens.cli.options import DATA_HELP, AllowUnreadable, with_recipe_flags
from convlens.cli.output import describe_params, describe_sweep, describe_trial, echo, print_trials, rank_trial
from convlens.cli.signals import graceful_stop, sigint_handler
from convlens.cli.startup import gc_paused
from convlens.errors import ConvlensError, TrainingInterruptedError, UsageError
from convlens.run_dir import RunDir
from convlens.system.extras import missing_extra
from convlens.system.text import quoted

if TYPE_CHECKING:
    from convlens.sweep.study import Sweep

TRIALS, SEEDS = 20, 3


@with_recipe_flags
def sweep(
    data: Annotated[str | None, typer.Argument(help=DATA_HELP)] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="What to search; repeatable: lr=1e-4..1e-1:log, momentum=0..0.99, batch-size=64,128,256.",
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help=f"Trials in all, including earlier ones; by default {TRIALS}.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trials at a time, each with its part of the cores.")] = 1,
    recipe: Annotated[str | None, typer.Option(help="Recipe to start from; by default that of the data.")] = None,
    config: Annotated[Path | None, typer.Option(help="Take that recipe from a file, as `train --config` does.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="URL of a database that several processes or machines share; $NAME is expanded.")
    ] = None,
    confirm_seeds: Annotated[
        int, typer.Option(help="Fresh seeds to train and test the best and the base recipe with; 0: none.")
    ] = SEEDS,
    out: Annotated[Path | None, typer.Option(help="Folder for the sweep, instead of runs/DATA-sweep-N.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the sweep in this folder.")] = None,
    allow_unreadable: AllowUnreadable = False,
    **overrides: Any,
) -> None:
    """Search for a better recipe: many short trainings, compared on validation images.

    Trials that fall behind are stopped early. At the end the best and the base recipe are trained with fresh seeds and
    compared on the test images. Recipe flags are the same for all trials.

    Examples:
      convlens sweep digits --param lr=1e-3..1:log --param momentum=0..0.99 --trials 50

      convlens sweep mnist --recipe mnist-4conv --val-fraction 0.1 --param kernel-size=3,5 --epochs 3 --jobs 2

      convlens sweep mnist --param width=8,16,32 --storage sqlite:///sweep.db

      convlens sweep --resume runs/digits-sweep-1 --trials 100
    """
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if (data is None) == (resume is None):
        raise UsageError("name the data to search on, or a sweep to --resume, one of the two")
    if resume is not None and (overrides or param or recipe or config or storage or out or allow_unreadable):
        raise UsageError("--resume continues the sweep as planned; it takes --trials, --jobs and --confirm-seeds only")
    if recipe is not None and config is not None:
        raise UsageError("give --recipe or --config, not both")
    if confirm_seeds == 1 or confirm_seeds < 0:
        raise UsageError(f"--confirm-seeds is {confirm_seeds}; it takes 2 seeds or more, or 0 for none")
    signal.signal(signal.SIGINT, sigint_handler("interrupted; nothing was started"))
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise missing_extra("a sweep needs Optuna", "sweep") from None
    with gc_paused():
        from convlens.sweep.study import Sweep
        from convlens.system.hardware import available_cores
        from convlens.training.recipes import read_recipe

    if jobs > available_cores():
        raise UsageError(f"--jobs is {jobs}; this machine lets convlens use {available_cores()} cores")
    if resume is not None:
        planned = Sweep.resume(resume, trials=trials)
    else:
        chosen: Any = read_recipe(config) if config is not None else recipe
        given: dict[str, Any] = {"storage": storage, "out": out, "allow_unreadable": allow_unreadable, **overrides}
        planned = Sweep.create(data, chosen, params=param or (), trials=TRIALS if trials is None else trials, **given)
    with RunDir(planned.folder).locked():
        run_sweep(planned, jobs, max(available_cores() // jobs, 1), confirm_seeds)


def run_sweep(sweep: Sweep, jobs: int, threads: int, seeds: int) -> None:
    """Run the trials, write the outcome and confirm the best; print how to continue if that is interrupted."""
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    from convlens.sweep.results import trial_rows, write_outcome
    from convlens.sweep.worker import Worker, helper_processes

    with graceful_stop() as should_stop:
        for line in describe_sweep(sweep, jobs):
            echo(line)
        try:
            reporter, show = TrialReporter(sweep), jobs == 1 and sys.stderr.isatty()
            with helper_processes(sweep, jobs - 1, threads) as count_helpers:
                Worker(
                    sweep, threads, should_stop, reporter.report, show_progress=show, count_helpers=count_helpers
                ).run()
            reporter.report()
            best = write_outcome(sweep)["best"]
            print_trials(trial_rows(sweep), list(sweep.space))
            echo(f"best    trial {best['trial']}: val {best['val_acc']:.2%} with {describe_params(best['params'])}")
            verdict, is_better = confirm_best(sweep, seeds, should_stop)
            echo(verdict)
        except (TrainingInterruptedError, KeyboardInterrupt):
            with contextlib.suppress(ConvlensError):  # no trial is complete yet
                write_outcome(sweep)
            raise TrainingInterruptedError(f"interrupted; nothing is lost. Continue with: {sweep.command}") from None
        except (OptunaError, SQLAlchemyError, OSError) as error:
            reason = str(error.__cause__ or error).split("\n", 1)[0]
            raise ConvlensError(f"the storage failed: {reason}. Continue with: {sweep.command}") from None
    echo(f"report  {sweep.folder / 'report.html'}")
    if is_better:
        data = quoted(sweep.plan["data"] if sweep.plan["data"] is not None else "DATA")
        echo(f"train with: convlens train {data} --config {quoted(sweep.folder / 'best.json')}")


class TrialReporter:
    """Prints a line for every trial that has ended, in whatever process, since its last report."""

    def __init__(self, sweep: Sweep):
        from convlens.sweep.results import trial_rows

        self._sweep, self._rows = sweep, trial_rows
        before = trial_rows(sweep)
        self._reported = {row["trial"] for row in before}
        self._started, self._first = time.monotonic(), len(before)

    def report(self) -> None:
        """Print the new lines."""
        rows = self._rows(self._sweep)
        new = [row for row in rows if row["trial"] not in self._reported]
        if not new:
            return
        done = [row for row in rows if row["state"] != "interrupted"]
        best = min((row for row in done if row["state"] == "complete"), key=rank_trial, default=None)
        so_far = f"best {best['val_acc']:.2%}" if best else "no best yet"
        seconds = (time.monotonic() - self._started) / max(len(rows) - self._first, 1)
        left = f"{seconds * max(self._sweep.plan['trials'] - len(done), 0):,.0f} s left"
        for row in new:
            self._reported.add(row["trial"])
            echo(describe_trial(row, self._sweep.space, f"{so_far}, {left}"))


def confirm_best(sweep: Sweep, seeds: int, should_stop: Callable[[], bool]) -> tuple[str, bool]:
    """Train the best and the base recipe with fresh seeds and write the comparison.

    Returns:
        The verdict as a line, and whether to recommend the best recipe.
    """
    from convlens.sweep.confirm import compare_confirmed, confirm, is_base
    from convlens.sweep.results import write_outcome

    if is_base(sweep):
        return "nothing better than the base recipe was found: there is no reason to change it", False
    if not seeds:
        why = "the best of many trials looks better than it is, so nothing is claimed"
        return f"not confirmed (--confirm-seeds 0): {why}", True
    if sweep.joined:
        return f"the process that created the study confirms it; to do so here as well: {sweep.command}", False
    for which, name, run in confirm(sweep, seeds, should_stop, show_progress=True):
        echo(f"confirm {which} recipe, {name}: test accuracy {run.accuracy:.2%}")
    confirmation = compare_confirmed(sweep, seeds)
    write_outcome(sweep, confirmation)
    if confirmation["interval"][0] > 0:
        return f"verdict {confirmation['verdict']}", True
    return f"verdict {confirmation['verdict']}: there is no reason to change the base recipe", False
