"""The outcome of a sweep: its trials as rows, the best recipe as a file, plots and a report."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from convlens.errors import ConvlensError
from convlens.reports import sweep as sweep_report
from convlens.sweep.space import Choice
from convlens.sweep.study import PER_MACHINE, PLAN, Sweep
from convlens.sweep.worker import repeated_trials
from convlens.system.files import read_json, write_csv, write_json
from convlens.training.recipe import LENGTHS, Recipe
from convlens.training.recipes import RECIPES, get_recipe

BEST_RECIPE = "best.json"
MIN_TRIALS = 10  # complete ones, before importances are computed
STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


def trial_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """Return the row of every trial that has ended: number, state, validation accuracy, length, values, worker.

    The state is complete, pruned, failed, or interrupted, which means that another trial repeats it.
    """
    repeated = repeated_trials(sweep.study)
    rows = []
    for trial in sweep.study.get_trials(deepcopy=False, states=tuple(STATES)):
        about, again = trial.user_attrs, trial.number in repeated
        lost = None if trial.state is not TrialState.FAIL else "it is repeated" if again else "its process died"
        rows.append(
            {
                "trial": trial.number + 1,
                "state": "interrupted" if again else STATES[trial.state],
                "val_acc": trial.value if trial.state is not TrialState.FAIL else None,
                "val_loss": about.get("val_loss"),
                "epochs": about.get("epochs"),
                "seconds": about.get("seconds"),
                **{name: trial.params.get(name) for name in sweep.space},
                "reason": about.get("reason", lost),
                "worker": about.get("worker"),
            }
        )
    return rows


def best_trial(sweep: Sweep) -> FrozenTrial | None:
    """Return the complete trial with the highest validation accuracy; of equals, that with the lowest loss."""
    complete = sweep.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return min(complete, key=lambda t: (-(t.value or 0.0), t.user_attrs.get("val_loss", 0.0), t.number), default=None)


def importances(sweep: Sweep) -> dict[str, float]:
    """Return each field's importance for the accuracy, 0 to 1 (PED-ANOVA, Watanabe et al. 2023).

    Empty with fewer than 10 complete trials, or if all trials are alike.
    """
    if len(sweep.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < MIN_TRIALS or len(sweep.space) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = optuna.importance.get_param_importances(sweep.study)
        except (ValueError, RuntimeError):
            return {}
    return {name: fraction for name, fraction in found.items() if math.isfinite(fraction)}


def recipe_file(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as ``convlens train --config`` reads it: the named recipe it is based on, and the differences."""
    everything = {name: value for name, value in vars(recipe).items() if name not in PER_MACHINE}
    if recipe.name not in RECIPES:
        return everything
    start = get_recipe(recipe.name)
    own = {name: value for name, value in everything.items() if value != getattr(start, name)}
    # a new length replaces the old one
    return {"recipe": recipe.name, **{n: v for n, v in own.items() if not (n in LENGTHS and v is None)}}


def write_outcome(sweep: Sweep, confirmation: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write trials.csv, sweep.json, best.json, the plots and report.html; return the content of sweep.json.

    Raises ConvlensError if no trial is complete.
    """
    rows, best = trial_rows(sweep), best_trial(sweep)
    before = read_json(sweep.folder / PLAN)
    if confirmation is None and best is not None and before.get("best", {}).get("trial") == best.number + 1:
        confirmation = before.get("confirmation")  # it is still valid
    write_csv(sweep.folder / "trials.csv", list(rows[0]) if rows else [], [list(row.values()) for row in rows])
    outcome = {
        **sweep.plan,
        "states": dict(Counter(row["state"] for row in rows)),
        "workers": dict(Counter(row["worker"] for row in rows if row["worker"])),
        "importance": importances(sweep),
        "confirmation": confirmation,
    }
    if best is not None:
        outcome["best"] = {"trial": best.number + 1, "val_acc": best.value, "params": best.params}
    write_json(sweep.folder / PLAN, outcome)
    if best is None:
        reasons = Counter(row["reason"] for row in rows if row["reason"]).most_common(1)
        why = f"; the most frequent reason: {reasons[0][0]}" if reasons else ""
        raise ConvlensError(f"no trial of {sweep.folder} is complete{why}")
    write_json(sweep.folder / BEST_RECIPE, recipe_file(sweep.base.override(**best.params)))
    logs = {name: not isinstance(values, Choice) and values.log for name, values in sweep.space.items()}
    sweep_report.write_report(sweep.folder, outcome, rows, logs)
    return outcome
