"""``convlens train``: a flag for every field of a recipe, a line an epoch, and a way back from Ctrl-C."""

from __future__ import annotations

import dataclasses
import inspect
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from convlens.cli.app import STARTED, app, gc_paused
from convlens.cli.options import AllowUnreadable, Exclude
from convlens.cli.output import describe_experiment, describe_record, describe_series, describe_test, echo
from convlens.cli.signals import graceful_stop, restore_sigint
from convlens.errors import TrainingInterruptedError, UsageError
from convlens.system.hardware import OWN_JOB
from convlens.system.text import quoted
from convlens.training.recipe import FIELD_TYPES, Recipe, flag, plain_type

if TYPE_CHECKING:
    from convlens.runs.experiment import Experiment
    from convlens.runs.group import RunGroup
    from convlens.runs.run import Run


def with_recipe_flags(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb one flag for every field of Recipe; they arrive as its keyword arguments."""
    hints = get_type_hints(verb, include_extras=True)
    declared = [p for p in inspect.signature(verb).parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [p.replace(annotation=hints[p.name]) for p in declared]
    for item in dataclasses.fields(Recipe):
        if item.name == "name":
            continue
        kind, _ = plain_type(item.name)
        choices = item.metadata["choices"]
        text = item.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
        names = [f"{flag(item.name)}/--no-{flag(item.name)[2:]}"] if kind is bool else [flag(item.name)]
        option = typer.Option(
            *names, help=text, rich_help_panel="Recipe (default: the recipe's own)", show_default=False
        )
        annotation: Any = Annotated[(FIELD_TYPES[item.name] | None, option)]
        parameters.append(
            inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )

    def call(**values: Any) -> None:
        verb(**values)

    call.__doc__, call.__name__ = verb.__doc__, verb.__name__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


@app.command()
@with_recipe_flags
def train(
    data: Annotated[
        str | None,
        typer.Argument(
            help="digits, mnist, fashion-mnist, cifar10, a folder of class folders, a .npz file, or shards."
        ),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe by name; `convlens recipes` lists them.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Take the recipe from a file: a sweep's best.json, a run's config.json.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the run, instead of runs/DATA-N.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted run in this folder.")] = None,
    init_from: Annotated[str | None, typer.Option(help="Start from this run's or model's trained stages.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Time for all of it, such as 60s or 5m: recipe and length are chosen.")
    ] = None,
    exclude: Exclude = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="Train so many seeds, and report mean and spread.")
    ] = None,
    folds: Annotated[
        int | None, typer.Option(metavar="K", help="Cross-validate: as many runs, each tested on its part.")
    ] = None,
    allow_unreadable: AllowUnreadable = False,
    processes: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Train in so many processes on this machine, which share every batch."),
    ] = 1,
    live: Annotated[bool, typer.Option("--live", help="Show a local page that follows the training.")] = False,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="With --resume: go on although device, machine or versions are others."),
    ] = False,
    **overrides: Any,
) -> None:
    """Train a classifier on DATA, test it once, and write everything into a run folder.

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
    from convlens.run_dir import RunDir

    overrides = {name: value for name, value in overrides.items() if value is not None}
    if (data is None) == (resume is None):
        raise UsageError("name the data to train on, or a run to --resume, one of the two")
    several = seeds is not None or folds is not None
    if resume is not None and (overrides or recipe or config or out or init_from or budget or several or exclude):
        raise UsageError("--resume goes on with the run's own recipe, so it takes nothing that would change it")
    if accept_changes and resume is None:
        raise UsageError("--accept-changes goes with --resume")
    if recipe is not None and config is not None:
        raise UsageError("give --recipe or --config, not both")
    if several and (init_from or budget):
        raise UsageError("--seeds and --folds take no --init-from and no --budget")
    if processes > 1 and several:
        raise UsageError("--processes is for one training; --seeds and --folds train one after the other")
    own = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if processes > 1 and own and not own.startswith(OWN_JOB):
        raise UsageError("torchrun says how many processes there are; leave --processes out")
    if processes > 1 and not own:
        from convlens.distributed.launcher import launch

        raise SystemExit(launch(sys.argv[1:], processes))  # its processes have said what there is to say
    with gc_paused():
        from convlens.distributed.process_group import init_world
        from convlens.runs.experiment import Experiment
        from convlens.runs.group import RunGroup

    restore_sigint()
    chosen: Any = recipe
    if config is not None:
        from convlens.training.recipes import read_recipe

        chosen = read_recipe(config)
    allowed = {"allow_unreadable": allow_unreadable, "accept_changes": accept_changes}
    if resume is not None and RunDir.is_series(resume):
        run_series(RunGroup.resume(resume, **allowed), live=live)
    elif resume is not None:
        run_experiment(Experiment.resume(resume, finished_too=init_world().is_restart, **allowed), live=live)
    else:
        given: dict[str, Any] = {"out": out, "allow_unreadable": allow_unreadable, "exclude": exclude, **overrides}
        if several:
            run_series(RunGroup.create(data, chosen, seeds=seeds, folds=folds, **given), live=live)
        else:
            experiment = Experiment.create(data, chosen, started=STARTED, init_from=init_from, budget=budget, **given)
            run_experiment(experiment, live=live)


def show_live(folder: Path) -> None:
    """Show the page of a run or series for as long as this process lives, and say where."""
    from convlens.serving.dashboard import start_dashboard

    try:
        echo(f"live    {start_dashboard([folder])[1]}")
    except UsageError as error:  # the page is no reason not to train
        print(f"convlens: no live page: {error}", file=sys.stderr)


def print_dashboard_hint(folder: Path) -> None:
    """Say how to look again, for the page ends with this process."""
    echo(f"look again with: convlens watch {quoted(folder)}")


def run_series(series: RunGroup, *, live: bool = False) -> None:
    """Train what a series still lacks, and say how far its runs lie apart."""
    echo(f"series  {series.folder}: {', '.join(series.plan['runs'])}")
    if live:
        show_live(series.folder)
    try:
        for experiment in series.experiments():
            run_experiment(experiment, part_of=series.folder)
    except KeyboardInterrupt:  # between two runs
        raise TrainingInterruptedError(
            f"interrupted; go on with: convlens train --resume {quoted(series.folder)}"
        ) from None
    for line in describe_series(series.finish()):
        echo(line)
    if live:
        print_dashboard_hint(series.folder)


def run_experiment(experiment: Experiment, part_of: Path | None = None, *, live: bool = False) -> Run:
    """Train with a line an epoch; Ctrl-C (or a polite kill) finishes the step, saves, and says how to go on.

    That is by the series that it is a part of, if it is.
    """
    from convlens.distributed.process_group import launcher_died

    whole = part_of or experiment.folder.path
    alone, first = experiment.ranks.size == 1, experiment.ranks.is_main
    if not first:  # one process speaks for all
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    describe_experiment(experiment)
    if live and first:
        show_live(experiment.folder.path)
    with graceful_stop(alone=alone, told=first) as asked:
        try:
            for record in experiment.epochs(should_stop=lambda: asked() or launcher_died(), show_progress=True):
                echo(describe_record(record))
        except TrainingInterruptedError as error:
            raise TrainingInterruptedError(
                f"{error}; saved. Go on with: convlens train --resume {quoted(whole)}"
            ) from None
    untested = f"trained, but not tested; go on with: convlens train --resume {quoted(whole)}"
    if experiment.ranks.any(asked()):  # in the last step, or behind it
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
    program = "convlens" if shutil.which("convlens") else sys.argv[0]  # make demo uses it without a path to it
    echo(f"predict with: {program} predict {quoted(run.path)} IMAGE")
    if live and first:
        print_dashboard_hint(run.path)
    return run
