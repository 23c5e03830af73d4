"""Several trainings of one kind, so that their spread is seen: other seeds, or the folds of a cross-validation."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convlens.data.cross_validation import assign_folds, merge, take_fold
from convlens.data.dataset import Dataset
from convlens.data.loading import data_name, load_dataset, refuse_inside_data
from convlens.distributed.process_group import require_single_process
from convlens.errors import UsageError
from convlens.evaluation.metrics import wilson_interval
from convlens.run_dir import SERIES, RunDir
from convlens.runs.artifacts import current_command
from convlens.runs.experiment import Experiment
from convlens.runs.resume import environment_diff
from convlens.runs.run import Run
from convlens.system.files import read_json, read_name_list, write_json
from convlens.system.random import preserve_rng_state
from convlens.training.pretrained import input_spec, start_from_weights
from convlens.training.recipe import Recipe
from convlens.training.recipes import default_recipe, get_recipe

SUMMARY = "summary.json"


@dataclass(eq=False)
class RunGroup:
    """Runs beside each other in one folder: iterate :meth:`experiments`, train each, then call :meth:`finish`."""

    folder: Path
    plan: dict[str, Any]  # what series.json says: kind, names of the runs, how each is trained
    data: Dataset
    first: Experiment | None = None  # that is set up already
    accept_changes: bool = False  # of the machine since its runs were started

    @classmethod
    def create(
        cls,
        data: Any,
        recipe: str | Recipe | None = None,
        *,
        seeds: int | None = None,
        folds: int | None = None,
        out: str | Path | None = None,
        allow_unreadable: bool = False,
        exclude: str | Path | None = None,
        **overrides: Any,
    ) -> RunGroup:
        """Plan ``seeds`` runs with seeds from ``overrides["seed"]`` (0) on, or one run for each of ``folds`` folds.

        For folds all images, those of the test split too, are dealt out anew: each is tested on once. Options are
        those of :func:`convlens.train`. Raises UsageError for less than two of either.
        """
        require_single_process("a series of trainings")
        kind, count = ("fold", folds) if seeds is None else ("seed", seeds)
        if count is None or (seeds is not None and folds is not None):
            raise UsageError("give --seeds or --folds, one of the two: each fold is one training")
        if count < 2:
            raise UsageError(f"--{kind}s is {count}; a spread needs at least 2")
        if out is not None:
            RunDir.refuse_existing(out)
        if not isinstance(recipe, Recipe):
            recipe = get_recipe(recipe) if recipe is not None else default_recipe(data_name(data))
        settled = recipe.override(**overrides)
        form = input_spec(settled, start_from_weights(settled))
        dataset = load_dataset(data, **form, allow_unreadable=allow_unreadable)
        if exclude is not None:
            dataset = dataset.without(read_name_list(exclude))
        refuse_inside_data(out, dataset)
        if folds is not None:
            assign_folds(merge(dataset)[0].labels, dataset.classes, folds)
        plan = {
            "kind": kind,
            "runs": [f"{kind}-{number + (settled.seed if kind == 'seed' else 1)}" for number in range(count)],
            "seed": settled.seed,
            **form,
            "data": dataset.source,
            "excluded": list(dataset.left_out),
            "fingerprint": dataset.fingerprint(),
            "recipe": dataclasses.asdict(recipe),
            "overrides": {name: value for name, value in overrides.items() if name != "seed"},
            "allow_unreadable": allow_unreadable,
            "command": current_command(),
        }
        folder = RunDir.create(out, f"{dataset.name}-{kind}s").path
        series = cls(folder, plan, dataset)
        try:
            series.first = series.make(0)
        except BaseException:  # what does not fit together leaves no folder
            shutil.rmtree(folder)
            raise
        write_json(folder / SERIES, plan)
        return series

    @classmethod
    def resume(
        cls,
        path: str | Path,
        data: Any = None,
        *,
        allow_unreadable: bool = False,
        accept_changes: bool = False,
    ) -> RunGroup:
        """Set up an unfinished series to go on; ``data`` names what was trained on, if it is not on disk.

        Raises UsageError if it is finished, the data have changed, or as Experiment.resume does.
        """
        require_single_process("a series of trainings")
        plan = read_json(Path(path) / SERIES)
        if (Path(path) / SUMMARY).exists():
            raise UsageError(f"the series {path} is finished; nothing to resume")
        source = data if data is not None else plan.get("data")
        if source is None:
            raise UsageError(f"the data of {path} were objects in memory; only data on disk can be resumed")
        allowed = allow_unreadable or plan["allow_unreadable"]
        form = {key: plan[key] for key in ("image_size", "channels") if key in plan}
        dataset = load_dataset(source, **form, allow_unreadable=allowed)
        if not dataset.left_out:
            dataset = dataset.without(plan["excluded"])
        if dataset.fingerprint() != plan["fingerprint"]:
            raise UsageError(f"the data of {path} have changed since it was started; train anew")
        first = RunDir(Path(path) / plan["runs"][0])
        if first.config.is_file():  # the runs to come are to be what the first one is
            environment_diff(path, first.read_config(), accept=accept_changes)
        return cls(Path(path), plan, dataset, accept_changes=accept_changes)

    def experiments(self) -> Iterator[Experiment]:
        """Yield what is still to be trained, one after another: new runs, and those that were interrupted."""
        with RunDir(self.folder).claimed():
            for number, name in enumerate(self.plan["runs"]):
                if not RunDir(self.folder / name).report.exists():
                    first, self.first = self.first, None
                    yield first or self.make(number)

    def make(self, number: int) -> Experiment:
        """Set up run ``number`` (from 0), or set up to go on what there is of it."""
        run = RunDir(self.folder / self.plan["runs"][number])
        data, seed = self.data, self.plan["seed"]
        if self.plan["kind"] == "fold":
            data = take_fold(data, number + 1, len(self.plan["runs"]))
        else:
            seed += number
        if run.config.is_file():
            return Experiment.resume(run.path, data, accept_changes=self.accept_changes)
        if run.path.exists():  # interrupted before there was anything to go on with
            shutil.rmtree(run.path)
        recipe = Recipe.from_json(self.plan["recipe"])
        return Experiment.create(data, recipe, out=run.path, seed=seed, **self.plan["overrides"])

    def finish(self) -> dict[str, Any]:
        """Return what came of the runs, and write it as ``summary.json``.

        Mean and standard deviation of the accuracy, best and worst, and each run's Wilson interval; for folds also
        that of all images together, each of which was tested on once.
        """
        runs = {name: Run(self.folder / name) for name in self.plan["runs"]}
        accuracies = {name: run.accuracy for name, run in runs.items()}
        worst, best = (pick(accuracies, key=accuracies.__getitem__) for pick in (min, max))
        summary: dict[str, Any] = {
            "kind": self.plan["kind"],
            "n": len(runs),
            "mean": statistics.mean(accuracies.values()),
            "sd": statistics.stdev(accuracies.values()),
            "worst": {"run": worst, "accuracy": accuracies[worst]},
            "best": {"run": best, "accuracy": accuracies[best]},
            "runs": {
                name: {"accuracy": run.accuracy, "accuracy_ci95": run.test["accuracy_ci95"]}
                for name, run in runs.items()
            },
            "interval_method": "Wilson, 95%",
        }
        if self.plan["kind"] == "fold":
            correct, n = (sum(run.test[key] for run in runs.values()) for key in ("correct", "num_images"))
            summary["together"] = {
                "num_images": n, "accuracy": correct / n, "accuracy_ci95": list(wilson_interval(correct, n))
            }  # fmt: skip
        write_json(self.folder / SUMMARY, summary)
        return summary


def train_series(
    data: Any, recipe: str | Recipe | None = None, *, show_progress: bool = False, **options: Any
) -> dict[str, Any]:
    """Train several seeds, or the folds of a cross-validation, and return what they came to.

    ``seeds=5`` or ``folds=5``, and the options of :func:`convlens.train` but ``init_from`` and ``budget``; the runs lie
    beside each other in ``out``, or in the next free ``runs/<data>-seeds-<n>`` (or ``folds``). The summary is that of
    ``summary.json``: ``kind`` ("seed" or "fold"), ``n``, ``mean`` and ``sd`` (n - 1) of the test accuracies, 0..1,
    ``best`` and ``worst``, ``runs`` by name with the Wilson interval of each, and for folds ``together``: all images,
    each of which was tested on once. Raises what :func:`convlens.train` raises, and UsageError for both, or less than
    two of either.
    """
    with preserve_rng_state():
        series = RunGroup.create(data, recipe, **options)
        for experiment in series.experiments():
            for _ in experiment.epochs(show_progress=show_progress):
                pass
            experiment.finish()
        return series.finish()
