"""``convlens train``."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convlens.cli.options import DATA_HELP, AllowUnreadable, Exclude, given_overrides, with_recipe_flags
from convlens.cli.output import describe_experiment, describe_group, describe_record, describe_test, echo
from convlens.cli.signals import graceful_stop, restore_sigint
from convlens.cli.startup import STARTED, gc_paused
from convlens.errors import TrainingInterruptedError, UsageError
from convlens.run_dir import RunDir
from convlens.system.hardware import OWN_JOB
from convlens.system.text import quoted

if TYPE_CHECKING:
    from convlens.runs.experiment import Experiment
    from convlens.runs.group import RunGroup
    from convlens.runs.run import Run


@with_recipe_flags
def train(
    data: Annotated[str | None, typer.Argument(help=DATA_HELP)] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe by name; `convlens recipes` lists them.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="File with a recipe: best.json of a sweep or config.json of a run.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the run (default: runs/DATA-N).")] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume the interrupted run in this folder.")] = None,
    init_from: Annotated[
        str | None, typer.Option(help="Fine-tune this run or model: keep its trained stages, replace its head.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Time limit of the whole command, such as 60s or 5m; sets recipe and length.")
    ] = None,
    exclude: Exclude = None,
    seeds: Annotated[int | None, typer.Option(metavar="N", help="Train N seeds; report mean and spread.")] = None,
    folds: Annotated[int | None, typer.Option(metavar="K", help="Cross-validate with K folds.")] = None,
    allow_unreadable: AllowUnreadable = False,
    processes: Annotated[
        int, typer.Option(min=1, metavar="N", help="Train in N processes on this machine, which split every batch.")
    ] = 1,
    live: Annotated[bool, typer.Option("--live", help="Show a local page that follows the training.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Resume although the device, machine or versions differ.")
    ] = False,
    **overrides: Any,
) -> None:
    """Train a classifier on DATA, evaluate it once on the test split, and write everything into a run folder.

    Examples:
      convlens train mnist

      convlens train mnist --budget 60s

      convlens train photos/ --epochs 40 --image-size 96

      convlens train mnist --recipe mnist-4conv --lr 0.02

      convlens train photos/ --folds 5

      convlens train mnist --live

      convlens train mnist --processes 2

      convlens train --resume runs/mnist-1
    """
    overrides = given_overrides(overrides)
    several = seeds is not None or folds is not None
    if (data is None) == (resume is None):
        raise UsageError("give either the data to train on, or a run to --resume")
    if resume is not None and (overrides or recipe or config or out or init_from or budget or several or exclude):
        raise UsageError("--resume uses the run's own recipe, so it takes no options that would change it")
    if accept_changes and resume is None:
        raise UsageError("--accept-changes goes with --resume")
    if recipe is not None and config is not None:
        raise UsageError("give --recipe or --config, not both")
    launch_processes(processes, several=several)
    with gc_paused():
        from convlens.distributed.process_group import init_world
        from convlens.runs.experiment import Experiment
        from convlens.runs.group import RunGroup
        from convlens.runs.request import TrainRequest
        from convlens.training.recipes import read_recipe

    restore_sigint()
    allowed = {"allow_unreadable": allow_unreadable, "accept_changes": accept_changes}
    if resume is not None and RunDir.is_group(resume):
        run_group(RunGroup.resume(resume, **allowed), live=live)
        return
    if resume is not None:
        run_experiment(Experiment.resume(resume, finished_too=init_world().is_restart, **allowed), live=live)
        return
    request = TrainRequest(
        data=data,
        recipe=recipe if config is None else read_recipe(config),
        overrides=overrides,
        out=out,
        init_from=init_from,
        budget=budget,
        exclude=exclude,
        allow_unreadable=allow_unreadable,
        started=STARTED,
    )
    if several:
        run_group(RunGroup.start(request, seeds=seeds, folds=folds), live=live)
    else:
        run_experiment(Experiment.start(request), live=live)


def launch_processes(processes: int, *, several: bool) -> None:
    """Start ``processes`` workers and exit with their code; do nothing for one process or within a worker."""
    if processes == 1:
        return
    if several:
        raise UsageError("--processes is for one training; --seeds and --folds train one after the other")
    own = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if own and not own.startswith(OWN_JOB):
        raise UsageError("torchrun sets the number of processes; leave --processes out")
    if not own:
        from convlens.distributed.launcher import launch

        raise SystemExit(launch(sys.argv[1:], processes))


def show_dashboard(folder: Path) -> None:
    """Serve the live page of a run or group until this process ends, and print its address."""
    from convlens.serving.dashboard import start_dashboard

    try:
        echo(f"live    {start_dashboard([folder])[1]}")
    except UsageError as error:  # training is possible without the page
        print(f"convlens: no live page: {error}", file=sys.stderr)


def print_dashboard_hint(folder: Path) -> None:
    """Print how to show the page again, because it ends with this process."""
    echo(f"show this page again with: convlens watch {quoted(folder)}")


def run_group(group: RunGroup, *, live: bool = False) -> None:
    """Train the runs of a group that are not finished, and print the summary."""
    echo(f"group   {group.path}: {', '.join(group.plan.runs)}")
    if live:
        show_dashboard(group.path)
    try:
        for experiment in group.experiments():
            run_experiment(experiment, part_of=group.path)
    except KeyboardInterrupt:  # between two runs
        raise TrainingInterruptedError(
            f"interrupted; resume with: convlens train --resume {quoted(group.path)}"
        ) from None
    for line in describe_group(group.finish()):
        echo(line)
    if live:
        print_dashboard_hint(group.path)


def run_experiment(experiment: Experiment, part_of: Path | None = None, *, live: bool = False) -> Run:
    """Train with one line per epoch; Ctrl-C and SIGTERM finish the step, save, and print how to resume.

    Args:
        experiment: The training.
        part_of: Folder of the group that the run belongs to, if any: the group is resumed, not the run.
        live: Serve the live page.
    """
    from convlens.distributed.process_group import launcher_died

    whole = part_of or experiment.run_dir.path
    alone, first = experiment.world.size == 1, experiment.world.is_main
    if not first:  # only rank 0 prints
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    describe_experiment(experiment)
    if live and first:
        show_dashboard(experiment.run_dir.path)
    with graceful_stop(alone=alone, announce=first) as asked:
        try:
            for record in experiment.epochs(should_stop=lambda: asked() or launcher_died(), show_progress=True):
                echo(describe_record(record))
        except TrainingInterruptedError as error:
            raise TrainingInterruptedError(
                f"{error}; saved. Resume with: convlens train --resume {quoted(whole)}"
            ) from None
    untested = f"trained, but not tested; resume with: convlens train --resume {quoted(whole)}"
    if experiment.world.any(asked()):  # asked to stop during or after the last step
        raise TrainingInterruptedError(untested)
    try:
        restore_sigint()
        run = experiment.finish()
    except KeyboardInterrupt:
        raise TrainingInterruptedError(untested) from None
    echo(describe_test(run.test))
    if part_of is not None:
        return run
    echo(f"report  {run.report}")
    program = "convlens" if shutil.which("convlens") else sys.argv[0]  # not on the PATH within `make demo`
    echo(f"predict with: {program} predict {quoted(run.path)} IMAGE")
    if live and first:
        print_dashboard_hint(run.path)
    return run
