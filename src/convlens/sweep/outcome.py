"""What came of a sweep: its trials as rows, the best recipe as a file, pictures, the confirmation on fresh seeds."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from convlens.errors import ConvlensError, Interrupted, UsageError
from convlens.evaluation.significance import PairedSeeds
from convlens.reports import sweep as sweep_report
from convlens.runs.compare import read_answers
from convlens.runs.group import SUMMARY, Series
from convlens.runs.run import Run
from convlens.sweep.space import Choice
from convlens.sweep.study import MACHINE, PLAN, Sweep
from convlens.sweep.work import BEAT, GRACE, cut_short, is_gone, process_name, settle
from convlens.system.files import read_json, write_csv, write_json
from convlens.training.recipe import LENGTHS, Recipe
from convlens.training.recipes import RECIPES, get_recipe

BEST = "best.json"
ENOUGH = 10  # trials that were trained to their end, before it is said what matters
STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


def trial_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """Return what is known of every trial that has ended: number, state, validation accuracy, length, values, worker.

    The state is complete, pruned, failed, or interrupted: cut short, and its values put back in line.
    """
    notes = sweep.study.user_attrs
    rows = []
    for trial in sweep.study.get_trials(deepcopy=False):
        if trial.state not in STATES:
            continue
        about, cut = trial.user_attrs, notes.get(cut_short(trial), {}) if trial.state is TrialState.FAIL else {}
        rows.append(
            {
                "trial": trial.number + 1,
                "state": "interrupted" if cut.get("again") else STATES[trial.state],
                "val_acc": trial.value if trial.state is not TrialState.FAIL else None,
                "val_loss": about.get("val_loss"),
                "epochs": about.get("epochs"),
                "seconds": about.get("seconds"),
                **{name: trial.params.get(name) for name in sweep.space},
                "reason": cut.get("reason", about.get("reason")),
                "worker": about.get("worker"),
            }
        )
    return rows


def count_ended(sweep: Sweep) -> int:
    """Return how many rows :func:`trial_rows` has."""
    return len(sweep.study.get_trials(deepcopy=False, states=tuple(STATES)))


def pick_best(sweep: Sweep) -> FrozenTrial | None:
    """Return the trial with the best validation accuracy of those trained to their end; of equals, the lower loss."""
    complete = sweep.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return min(complete, key=lambda t: (-(t.value or 0.0), t.user_attrs.get("val_loss", 0.0), t.number), default=None)


def importances(sweep: Sweep) -> dict[str, float]:
    """Return each field's share in what lies between good trials and the others (PED-ANOVA, Watanabe et al. 2023).

    Empty with fewer than 10 complete trials, or where all are alike.
    """
    if len(sweep.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < ENOUGH or len(sweep.space) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = optuna.importance.get_param_importances(sweep.study)
        except (ValueError, RuntimeError):
            return {}
    return {name: share for name, share in found.items() if math.isfinite(share)}


def recipe_file(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as ``convlens train --config`` reads it: the named one that it comes from, and what differs."""
    everything = {name: value for name, value in vars(recipe).items() if name not in MACHINE}
    if recipe.name not in RECIPES:
        return everything
    start = get_recipe(recipe.name)
    own = {name: value for name, value in everything.items() if value != getattr(start, name)}
    # a new length takes the place of the old
    return {"recipe": recipe.name, **{n: v for n, v in own.items() if not (n in LENGTHS and v is None)}}


def write_outcome(sweep: Sweep, confirmation: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write trials.csv, sweep.json, best.json, the pictures and report.html, and return what sweep.json says.

    Raises ConvlensError if no trial was trained to its end.
    """
    rows, best = trial_rows(sweep), pick_best(sweep)
    before = read_json(sweep.folder / PLAN)
    if confirmation is None and best is not None and before.get("best", {}).get("trial") == best.number + 1:
        confirmation = before.get("confirmation")  # it still holds
    write_csv(sweep.folder / "trials.csv", list(rows[0]) if rows else [], [list(row.values()) for row in rows])
    said = {
        **sweep.plan,
        "states": dict(Counter(row["state"] for row in rows)),
        "workers": dict(Counter(row["worker"] for row in rows if row["worker"])),
        "importance": importances(sweep),
        "confirmation": confirmation,
    }
    if best is not None:
        said["best"] = {"trial": best.number + 1, "val_acc": best.value, "params": best.params}
    write_json(sweep.folder / PLAN, said)
    if best is None:
        reasons = Counter(row["reason"] for row in rows if row["reason"]).most_common(1)
        why = f"; most often: {reasons[0][0]}" if reasons else ""
        raise ConvlensError(f"no trial of {sweep.folder} was trained to its end{why}")
    write_json(sweep.folder / BEST, recipe_file(sweep.base.override(**best.params)))
    logs = {name: not isinstance(values, Choice) and values.log for name, values in sweep.space.items()}
    sweep_report.write_report(sweep.folder, said, rows, logs)
    return said


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
                raise Interrupted("interrupted")
            yield which, experiment.folder.path.name, experiment.finish()
        if not (series.folder / SUMMARY).exists():
            series.finish()


def confirmation_series(sweep: Sweep, seeds: int) -> Iterator[tuple[str, Series]]:
    """Yield ("base", its series) and ("best", its series), begun or to go on; what is finished is left out."""
    for which, (folder, params) in confirmation_folders(sweep, seeds).items():
        if (folder / SUMMARY).exists():
            continue
        if (folder / "series.json").exists():
            yield which, Series.resume(folder, accept_changes=True)
            continue
        recipe = settle(sweep, params, sweep.base.threads)
        options = {"allow_unreadable": sweep.plan["allow_unreadable"], "seed": sweep.base.seed + 1}
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield which, Series.create(sweep.plan["data"], recipe, seeds=seeds, out=folder, **options)


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
        answers = [read_answers(run) for run in runs]
        right[which] = np.array([[answer[image] for image in sorted(answers[0])] for answer in answers])
        means[which] = float(right[which].mean())
    paired = PairedSeeds(right["base"], right["best"])
    name = "the base recipe" if sweep.base.name == "custom" else sweep.base.name
    return {
        "seeds": seeds,
        "test_accuracy": means,
        "difference": paired.difference,
        "interval": list(paired.interval),
        "verdict": paired.verdict(name, "the best one found"),
    }


class Claim:
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
        if time.monotonic() - self._beat > BEAT or not self._beat:
            self._beat = time.monotonic()
            # the time of day, for who looks in looks only once; clocks that differ by minutes cost time, no more
            self._study.set_user_attr("confirming", {"process": self._mine, "alive": time.time()})

    def release(self) -> None:
        """Give it up: it is done, or was interrupted."""
        self._study.set_user_attr("confirming", None)


def is_base(sweep: Sweep) -> bool:
    """Say whether nothing better than the base recipe was found."""
    best = pick_best(sweep)
    return best is not None and settle(sweep, best.params) == settle(sweep, {})


def require_seeds(seeds: int) -> None:
    """Raise UsageError for a number of fresh seeds that shows no spread."""
    if seeds == 1 or seeds < 0:
        raise UsageError(f"--confirm is {seeds}; it takes 2 seeds or more, or 0 for none")
