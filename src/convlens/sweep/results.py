"""What came of a sweep: its trials as rows, the best recipe as a file, pictures, the confirmation on fresh seeds."""

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
from convlens.sweep.study import MACHINE, PLAN, Sweep
from convlens.sweep.worker import cut_short
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
