"""``convlens sweep``: many short trainings in search of a better recipe, and an honest look at what was found."""

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
            help="What to search, as often as you like: lr=1e-4..1e-1:log, momentum=0..0.99, batch-size=64,128,256.",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="classic: batch size, kernel size, learning rate and momentum.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help=f"Trials in all, with those done before; {TRIALS} if not said.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trials at a time, each with its share of the cores.")] = 1,
    recipe: Annotated[str | None, typer.Option(help="Recipe to start from; by default that of the data.")] = None,
    config: Annotated[Path | None, typer.Option(help="Take that recipe from a file, as `train --config` does.")] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Journal file or database URL that several processes or machines share; $NAME is filled in."),
    ] = None,
    confirm: Annotated[
        int, typer.Option(help="Fresh seeds to train the best and the base recipe with, and to test; 0: none.")
    ] = SEEDS,
    out: Annotated[Path | None, typer.Option(help="Folder for the sweep, instead of runs/DATA-sweep-N.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the sweep in this folder.")] = None,
    allow_unreadable: AllowUnreadable = False,
    **overrides: Any,
) -> None:
    """Search for a better recipe: many short trainings, compared on validation images.

    Trials that lag behind are stopped early. At the end the best recipe and the one it started from are trained with
    fresh seeds and tested, to see whether it is better. Flags of a recipe are fixed for all trials.

    Examples:
      convlens sweep digits --param lr=1e-3..1:log --param momentum=0..0.99 --trials 50

      convlens sweep mnist --recipe mnist-4conv --val-fraction 0.1 --preset classic --epochs 3 --jobs 2

      convlens sweep mnist --param filters=8,16,32 --storage sqlite:///sweep.db

      convlens sweep --resume runs/digits-sweep-1 --trials 100
    """
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if (data is None) == (resume is None):
        raise UsageError("name the data to search on, or a sweep to --resume, one of the two")
    if resume is not None and (overrides or param or preset or recipe or config or storage or out or allow_unreadable):
        raise UsageError("--resume goes on with the sweep's own plan; it takes --trials, --jobs and --confirm only")
    if recipe is not None and config is not None:
        raise UsageError("give --recipe or --config, not both")
    signal.signal(signal.SIGINT, sigint_handler("interrupted; nothing was begun"))
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UsageError("a sweep needs a package more: pip install 'convlens[sweep]'") from None
    with gc_paused():
        from convlens.sweep.confirm import require_seeds
        from convlens.sweep.study import Sweep
        from convlens.system.hardware import available_cores
        from convlens.training.recipes import read_recipe

    require_seeds(confirm)
    if jobs > available_cores():
        raise UsageError(f"--jobs is {jobs}; this machine lets convlens use {available_cores()} cores")
    if resume is not None:
        planned = Sweep.resume(resume, trials=trials)
    else:
        chosen: Any = read_recipe(config) if config is not None else recipe
        given: dict[str, Any] = {"storage": storage, "out": out, "allow_unreadable": allow_unreadable, **overrides}
        trials = TRIALS if trials is None else trials
        planned = Sweep.create(data, chosen, params=param or (), preset=preset, trials=trials, **given)
    run_sweep(planned, jobs, confirm)


def run_sweep(sweep: Sweep, jobs: int, seeds: int) -> None:
    """Do the trials, write what came of them, and confirm the best; say how to go on if that is interrupted."""
    from convlens.sweep.results import trial_rows, write_outcome
    from convlens.sweep.worker import helpers, run_worker, share_of_cores

    with graceful_stop() as should_stop:
        for line in describe_sweep(sweep, jobs):
            echo(line)
        try:
            teller, threads = TrialReporter(sweep), share_of_cores(jobs)
            with helpers(sweep, jobs - 1, threads, warn) as look_after:
                show = jobs == 1 and sys.stderr.isatty()

                def between() -> None:
                    teller.tell()
                    look_after()

                run_worker(sweep, threads=threads, should_stop=should_stop, between=between, show_progress=show)
            said = write_outcome(sweep)
            print_trials(trial_rows(sweep), list(sweep.space))
            echo(f"best    trial {said['best']['trial']}: val {said['best']['val_acc']:.2%} with "
                f"{describe_params(said['best']['params'])}")  # fmt: skip
            verdict, worth_it = confirm_best(sweep, seeds, should_stop)
            echo(verdict)
        except (TrainingInterruptedError, KeyboardInterrupt):
            with contextlib.suppress(ConvlensError):  # no trial has come to its end yet
                write_outcome(sweep)
            raise TrainingInterruptedError(f"interrupted; nothing is lost. Go on with: {sweep.command}") from None
    echo(f"report  {sweep.folder / 'report.html'}")
    if worth_it:
        data = quoted(sweep.plan["data"] if sweep.plan["data"] is not None else "DATA")
        echo(f"train with: convlens train {data} --config {quoted(sweep.folder / 'best.json')}")


def warn(message: str) -> None:
    """Print a line for a person beside what the sweep prints."""
    print(f"convlens: {message}", file=sys.stderr)


class TrialReporter:
    """Prints a line for every trial that has ended since it last looked, whoever did it."""

    def __init__(self, sweep: Sweep):
        from convlens.sweep.results import count_ended, trial_rows

        self._sweep, self._rows, self._count = sweep, trial_rows, count_ended
        before = trial_rows(sweep)
        self._told = {row["trial"] for row in before}
        self._started, self._first = time.monotonic(), len(before)

    def tell(self) -> None:
        """Look, and print."""
        if self._count(self._sweep) == len(self._told):
            return
        rows = self._rows(self._sweep)
        done = [row for row in rows if row["state"] != "interrupted"]
        of = self._sweep.plan["trials"]
        best = min((row for row in done if row["state"] == "complete"), key=rank_trial, default=None)
        so_far = f"best {best['val_acc']:.2%}" if best else "no best yet"
        spent, new = time.monotonic() - self._started, len(rows) - self._first
        left = f"{spent / max(new, 1) * max(of - len(done), 0):,.0f} s left"
        for row in rows:
            if row["trial"] not in self._told:
                self._told.add(row["trial"])
                echo(describe_trial(row, self._sweep.space, f"{so_far}, {left}"))


def confirm_best(sweep: Sweep, seeds: int, should_stop: Callable[[], bool]) -> tuple[str, bool]:
    """Train the best and the base recipe with fresh seeds and write what that says.

    Return it as a line, and whether there is a reason to take the best recipe from now on.
    """
    from convlens.sweep.confirm import Lease, compare_confirmed, confirm, is_base
    from convlens.sweep.results import write_outcome

    if is_base(sweep):
        return "nothing better than the base recipe was found: there is no reason to change it", False
    if not seeds:
        why = "the best of many trials looks better than it is, so nothing is claimed"
        return f"not confirmed (--confirm 0): {why}", True
    claim = Lease(sweep)
    if other := claim.take():
        return f"another process confirms it ({other}); nothing is claimed here", False

    def stop_or_renew() -> bool:
        claim.renew()
        return should_stop()

    try:
        for which, name, run in confirm(sweep, seeds, stop_or_renew, show_progress=True):
            echo(f"confirm {which} recipe, {name}: test accuracy {run.accuracy:.2%}")
    finally:
        claim.release()
    confirmation = compare_confirmed(sweep, seeds)
    write_outcome(sweep, confirmation)
    if confirmation["interval"][0] > 0:
        return f"verdict {confirmation['verdict']}", True
    return f"verdict {confirmation['verdict']}: there is no reason to change the base recipe", False
