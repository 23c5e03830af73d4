"""Confirm the best trial of a sweep against its base on fresh seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convlens.errors import TrainingInterruptedError, UsageError
from convlens.evaluation.significance import SeedComparison
from convlens.run_dir import RunDir
from convlens.runs.compare import read_correctness
from convlens.runs.group import SUMMARY, RunGroup
from convlens.runs.request import TrainRequest
from convlens.runs.run import Run
from convlens.sweep.results import pick_best
from convlens.sweep.study import Sweep
from convlens.sweep.worker import GRACE, HEARTBEAT_SECONDS, is_gone, process_name, resolve


def confirm(
    sweep: Sweep, seeds: int, should_stop: Callable[[], bool], show_progress: bool = False
) -> Iterator[tuple[str, str, Run]]:
    """Train the best recipe and the base recipe with ``seeds`` fresh seeds each; yield (which, seed, run) as they end.

    The runs lie in ``confirm/`` of the sweep's folder; what is there already is not trained again. Raises Interrupted.
    """
    for which, series in confirmation_series(sweep, seeds):
        for experiment in series.experiments():
            for _ in experiment.epochs(should_stop=should_stop, show_progress=show_progress):
                pass
            if should_stop():
                raise TrainingInterruptedError("interrupted")
            yield which, experiment.run_dir.path.name, experiment.finish()
        if not (series.path / SUMMARY).exists():
            series.finish()


def confirmation_series(sweep: Sweep, seeds: int) -> Iterator[tuple[str, RunGroup]]:
    """Yield ("base", its series) and ("best", its series), begun or to go on; what is finished is left out."""
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
    """Return where the base recipe and the best one are trained again, and what distinguishes the best."""
    best = pick_best(sweep)
    assert best is not None
    place = sweep.folder / "confirm"
    return {
        "base": (place / f"base-{seeds}-seeds", {}),
        "best": (place / f"trial-{best.number + 1}-{seeds}-seeds", best.params),
    }


def compare_confirmed(sweep: Sweep, seeds: int) -> dict[str, Any]:
    """Return what the confirmation says: mean accuracies, the difference, its interval, the verdict as a sentence."""
    right, means = {}, {}
    for which, (folder, _) in confirmation_folders(sweep, seeds).items():
        runs = [Run(path) for path in sorted(folder.glob("seed-*"), key=lambda path: int(path.name[5:]))]
        answers = [read_correctness(run) for run in runs]
        right[which] = np.array([[answer[image] for image in sorted(answers[0])] for answer in answers])
        means[which] = float(right[which].mean())
    paired = SeedComparison(right["base"], right["best"])
    name = "the base recipe" if sweep.base.name == "custom" else sweep.base.name
    return {
        "seeds": seeds,
        "test_accuracy": means,
        "difference": paired.difference,
        "interval": list(paired.interval),
        "verdict": paired.verdict(name, "the best one found"),
    }


class Lease:
    """That one process confirms, and the others of the study need not; it is kept with the study.

    Two may look at the same moment and both take it. That costs time, no more: in folders of their own each does the
    work, and in the same folder the series, which one process at a time can train in, turns the second away.
    """

    def __init__(self, sweep: Sweep):
        self._study, self._mine, self._beat = sweep.study, process_name(), 0.0

    def take(self) -> str | None:
        """Return the name of another process that confirms already, else None: it is this one's to do."""
        claim = self._study.user_attrs.get("confirming") or {}
        other = claim.get("process")
        if other and other != self._mine and not is_gone(other) and time.time() - claim["alive"] < GRACE:
            return str(other)
        self.renew()
        return None

    def renew(self) -> None:
        """Give a sign of life, unless the last was a moment ago."""
        if time.monotonic() - self._beat > HEARTBEAT_SECONDS or not self._beat:
            self._beat = time.monotonic()
            # the time of day, for who looks in looks only once; clocks that differ by minutes cost time, no more
            self._study.set_user_attr("confirming", {"process": self._mine, "alive": time.time()})

    def release(self) -> None:
        """Give it up: it is done, or was interrupted."""
        self._study.set_user_attr("confirming", None)


def is_base(sweep: Sweep) -> bool:
    """Say whether nothing better than the base recipe was found."""
    best = pick_best(sweep)
    return best is not None and resolve(sweep, best.params) == resolve(sweep, {})


def require_seeds(seeds: int) -> None:
    """Raise UsageError for a number of fresh seeds that shows no spread."""
    if seeds == 1 or seeds < 0:
        raise UsageError(f"--confirm is {seeds}; it takes 2 seeds or more, or 0 for none")
