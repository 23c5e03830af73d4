"""Confirm the best trial of a sweep: train it and the base recipe with fresh seeds, and test both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convlens.errors import TrainingInterruptedError
from convlens.evaluation.significance import SeedComparison
from convlens.run_dir import RunDir
from convlens.runs.compare import read_correctness
from convlens.runs.group import SUMMARY, RunGroup
from convlens.runs.request import TrainRequest
from convlens.runs.run import Run
from convlens.sweep.results import best_trial
from convlens.sweep.study import Sweep
from convlens.sweep.worker import resolve


def confirm(
    sweep: Sweep, seeds: int, should_stop: Callable[[], bool], show_progress: bool = False
) -> Iterator[tuple[str, str, Run]]:
    """Train the base recipe and the best one with ``seeds`` fresh seeds each.

    The runs are in ``confirm/`` of the sweep's folder; finished ones are not trained again. Yields "base" or "best",
    the name of the run, and the run, as each ends. Raises TrainingInterruptedError when ``should_stop`` returns True.
    """
    for which, group in unfinished_groups(sweep, seeds):
        for experiment in group.experiments():
            for _ in experiment.epochs(should_stop=should_stop, show_progress=show_progress):
                pass
            if should_stop():
                raise TrainingInterruptedError("interrupted")
            yield which, experiment.run_dir.path.name, experiment.finish()
        if not (group.path / SUMMARY).exists():
            group.finish()


def unfinished_groups(sweep: Sweep, seeds: int) -> Iterator[tuple[str, RunGroup]]:
    """Yield "base" and "best", each with its runs, new or resumed."""
    for which, (folder, params) in confirmation_folders(sweep, seeds).items():
        if (folder / SUMMARY).exists():
            continue
        if RunDir.is_group(folder):
            yield which, RunGroup.resume(folder, accept_changes=True)
            continue
        recipe = resolve(sweep, params, sweep.base.threads)
        options = {"allow_unreadable": sweep.plan["allow_unreadable"], "seed": sweep.base.seed + 1}
        folder.parent.mkdir(parents=True, exist_ok=True)
        request = TrainRequest.create(sweep.plan["data"], recipe, out=folder, **options)
        yield which, RunGroup.start(request, seeds=seeds)


def confirmation_folders(sweep: Sweep, seeds: int) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return the folder and the searched values of the base recipe and of the best one."""
    best = best_trial(sweep)
    assert best is not None
    parent = sweep.folder / "confirm"
    return {
        "base": (parent / f"base-{seeds}-seeds", {}),
        "best": (parent / f"trial-{best.number + 1}-{seeds}-seeds", best.params),
    }


def compare_confirmed(sweep: Sweep, seeds: int) -> dict[str, Any]:
    """Return the mean test accuracies, their difference with its 95% interval, and the verdict as a sentence."""
    correct, means = {}, {}
    for which, (folder, _) in confirmation_folders(sweep, seeds).items():
        runs = [Run(path) for path in sorted(folder.glob("seed-*"), key=lambda path: int(path.name[5:]))]
        answers = [read_correctness(run) for run in runs]
        correct[which] = np.array([[answer[image] for image in sorted(answers[0])] for answer in answers])
        means[which] = float(correct[which].mean())
    comparison = SeedComparison(correct["base"], correct["best"])
    name = "the base recipe" if sweep.base.name == "custom" else sweep.base.name
    return {
        "seeds": seeds,
        "test_accuracy": means,
        "difference": comparison.difference,
        "interval": list(comparison.interval),
        "verdict": comparison.verdict(name, "the best one found"),
    }


def is_base(sweep: Sweep) -> bool:
    """Return True if no trial was better than the base recipe."""
    best = best_trial(sweep)
    return best is not None and resolve(sweep, best.params) == resolve(sweep, {})
