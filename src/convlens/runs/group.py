"""Groups of runs that show the spread of the accuracy: several seeds, or the folds of a cross-validation."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convlens.data.cross_validation import assign_folds, merge, take_fold
from convlens.data.dataset import Dataset
from convlens.data.loading import data_name, load_dataset, refuse_inside_data
from convlens.distributed.process_group import require_single_process
from convlens.errors import ConvlensError, UsageError
from convlens.evaluation.metrics import wilson_interval
from convlens.run_dir import GROUP, RunDir, require_new_path
from convlens.runs.artifacts import current_command
from convlens.runs.config import RunConfig
from convlens.runs.experiment import Experiment, named_recipe
from convlens.runs.request import TrainRequest
from convlens.runs.resume import environment_diff, require_data_on_disk, require_same_data
from convlens.runs.run import Run
from convlens.system.files import read_json, read_name_list, write_json
from convlens.system.random import preserve_rng_state
from convlens.training.pretrained import input_spec, start_from_weights
from convlens.training.recipe import Recipe
from convlens.training.recipes import default_recipe

SUMMARY = "summary.json"


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """The plan of a group, ``group.json``: its runs and how each is trained."""

    group_by: str  # "seed" or "fold"
    runs: tuple[str, ...]  # names of the run folders
    seed: int  # of the first run, or of all folds
    image_size: int
    channels: int
    data: str | None  # source of the data; None: objects in memory
    excluded: tuple[str, ...]
    fingerprint: str
    recipe: Recipe
    overrides: dict[str, Any]  # of the recipe, without the seed
    allow_unreadable: bool
    command: str

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``group.json``."""
        return {
            **vars(self),
            "runs": list(self.runs),
            "excluded": list(self.excluded),
            "recipe": dataclasses.asdict(self.recipe),
        }

    @classmethod
    def read(cls, path: Path) -> GroupPlan:
        """Read ``group.json``; ConvlensError if it is missing or damaged."""
        values = read_json(path)
        try:
            recipe = Recipe.from_json(values["recipe"])
            runs, excluded = tuple(values["runs"]), tuple(values["excluded"])
            return cls(**{**values, "runs": runs, "excluded": excluded, "recipe": recipe})
        except (UsageError, KeyError, TypeError, ValueError) as error:
            raise ConvlensError(f"{path} is of another version of convlens, or damaged: {error!r}") from None


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """The result of a group, ``summary.json``. Accuracies are those of the test split, 0..1."""

    group_by: str  # "seed" or "fold"
    n: int
    mean: float
    sd: float  # with n - 1
    worst: dict[str, Any]  # "run" and "accuracy"
    best: dict[str, Any]
    runs: dict[str, dict[str, Any]]  # by name: "accuracy" and "accuracy_ci95" (Wilson, 95%)
    pooled: dict[str, Any] | None = None  # of folds: "num_images", "accuracy" and "accuracy_ci95" over all images
    interval_method: str = "Wilson, 95%"

    @classmethod
    def of(cls, group_by: str, runs: Mapping[str, Run]) -> GroupSummary:
        """Summarize finished runs."""
        accuracies = {name: run.accuracy for name, run in runs.items()}
        worst, best = (pick(accuracies, key=accuracies.__getitem__) for pick in (min, max))
        pooled = None
        if group_by == "fold":
            correct, n = (sum(run.test[key] for run in runs.values()) for key in ("correct", "num_images"))
            pooled = {"num_images": n, "accuracy": correct / n, "accuracy_ci95": list(wilson_interval(correct, n))}
        return cls(
            group_by=group_by,
            n=len(runs),
            mean=statistics.mean(accuracies.values()),
            sd=statistics.stdev(accuracies.values()),
            worst={"run": worst, "accuracy": accuracies[worst]},
            best={"run": best, "accuracy": accuracies[best]},
            runs={
                name: {"accuracy": run.accuracy, "accuracy_ci95": run.test["accuracy_ci95"]}
                for name, run in runs.items()
            },
            pooled=pooled,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``summary.json``."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> GroupSummary:
        """Rebuild a summary from the content of ``summary.json``."""
        return cls(**values)


@dataclass(eq=False)
class RunGroup:
    """Runs in one folder: call :meth:`run`, or train each of :meth:`experiments` and call :meth:`finish`."""

    path: Path
    plan: GroupPlan
    data: Dataset
    accept_changes: bool = False  # of the environment since the runs were started
    _first: Experiment | None = field(default=None, repr=False)  # prepared already

    @classmethod
    def start(cls, request: TrainRequest, *, seeds: int | None = None, folds: int | None = None) -> RunGroup:
        """Plan ``seeds`` runs with consecutive seeds, or one run for each of ``folds`` folds.

        Folds divide all images, including those of the test split; each image is tested once.

        Raises:
            UsageError: Both or neither of ``seeds`` and ``folds`` are given, or less than two; ``init_from`` and
                ``budget`` do not go with a group. Otherwise as :meth:`Experiment.start`; no folder is left behind.
        """
        require_single_process("a group of runs")
        if (seeds is None) == (folds is None):
            raise UsageError("give either `seeds` or `folds`: each fold is one training")
        group_by, count = ("seed", seeds) if folds is None else ("fold", folds)
        if count is None or count < 2:
            raise UsageError(f"`{group_by}s` is {count}; a spread needs at least 2", field=f"{group_by}s")
        if request.init_from is not None or request.budget is not None:
            raise UsageError("`seeds` and `folds` do not go with `init_from` or `budget`")
        if request.out is not None:
            require_new_path(request.out)
        recipe = named_recipe(request) or default_recipe(data_name(request.data))
        resolved = recipe.override(**request.overrides)
        spec = input_spec(resolved, start_from_weights(resolved))
        dataset = load_dataset(request.data, **spec, allow_unreadable=request.allow_unreadable)
        if request.exclude is not None:
            dataset = dataset.drop(read_name_list(request.exclude))
        refuse_inside_data(request.out, dataset)
        if folds is not None:
            assign_folds(merge(dataset)[0].labels, dataset.classes, folds)
        first = resolved.seed if group_by == "seed" else 1
        plan = GroupPlan(
            group_by=group_by,
            runs=tuple(f"{group_by}-{first + number}" for number in range(count)),
            seed=resolved.seed,
            **spec,
            data=dataset.source,
            excluded=tuple(dataset.excluded),
            fingerprint=dataset.fingerprint(),
            recipe=recipe,
            overrides={name: value for name, value in request.overrides.items() if name != "seed"},
            allow_unreadable=request.allow_unreadable,
            command=current_command(),
        )
        path = RunDir.create(request.out, f"{dataset.name}-{group_by}s").path
        group = cls(path, plan, dataset)
        try:
            group._first = group.prepare(0)
        except BaseException:  # including Ctrl-C
            shutil.rmtree(path)
            raise
        write_json(path / GROUP, plan.to_json())
        return group

    @classmethod
    def resume(
        cls,
        path: str | Path,
        data: Any = None,
        *,
        allow_unreadable: bool = False,
        accept_changes: bool = False,
    ) -> RunGroup:
        """Prepare an unfinished group to continue; arguments and errors are those of :meth:`Experiment.resume`."""
        require_single_process("a group of runs")
        path = Path(path)
        plan = GroupPlan.read(path / GROUP)
        if (path / SUMMARY).exists():
            raise UsageError(f"the group {path} is finished; nothing to resume")
        dataset = load_dataset(
            require_data_on_disk(path, plan.data, data),
            image_size=plan.image_size,
            channels=plan.channels,
            allow_unreadable=allow_unreadable or plan.allow_unreadable,
        )
        if not dataset.excluded:
            dataset = dataset.drop(plan.excluded)
        require_same_data(path, dataset, plan.fingerprint)
        first = RunDir(path / plan.runs[0])
        if first.config.is_file():  # the next runs must be comparable with it
            environment_diff(path, RunConfig.read(first.config), accept=accept_changes)
        return cls(path, plan, dataset, accept_changes)

    def experiments(self) -> Iterator[Experiment]:
        """Yield the runs that are not finished, one after the other: interrupted ones and new ones."""
        with RunDir(self.path).locked():
            for number, name in enumerate(self.plan.runs):
                if not RunDir(self.path / name).report.exists():
                    first, self._first = self._first, None
                    yield first or self.prepare(number)

    def prepare(self, number: int) -> Experiment:
        """Start or resume run ``number`` (from 0)."""
        plan, data, seed = self.plan, self.data, self.plan.seed
        run_dir = RunDir(self.path / plan.runs[number])
        if plan.group_by == "fold":
            data = take_fold(data, number + 1, len(plan.runs))
        else:
            seed += number
        if run_dir.config.is_file():
            return Experiment.resume(run_dir.path, data, accept_changes=self.accept_changes)
        if run_dir.path.exists():  # interrupted before there was anything to resume
            shutil.rmtree(run_dir.path)
        overrides = {**plan.overrides, "seed": seed}
        return Experiment.start(TrainRequest(data=data, recipe=plan.recipe, overrides=overrides, out=run_dir.path))

    def finish(self) -> GroupSummary:
        """Summarize the finished runs, and write ``summary.json``."""
        summary = GroupSummary.of(self.plan.group_by, {name: Run(self.path / name) for name in self.plan.runs})
        write_json(self.path / SUMMARY, summary.to_json())
        return summary

    def run(self, *, show_progress: bool = False) -> GroupSummary:
        """Train all runs that are not finished, and finish."""
        for experiment in self.experiments():
            experiment.run(show_progress=show_progress)
        return self.finish()


def train_seeds(
    data: Any, n: int, recipe: str | Recipe | None = None, *, show_progress: bool = False, **options: Any
) -> GroupSummary:
    """Train the same recipe with ``n`` seeds, to see the spread of the test accuracy.

    Args:
        data: Whatever :func:`convlens.load_dataset` takes.
        n: Number of seeds, at least 2. They count up from the recipe's ``seed``.
        recipe: Name of a recipe, a Recipe, or None for the default of the data.
        show_progress: Show a progress bar on standard error.
        **options: Other arguments of :func:`convlens.train`, except ``init_from`` and ``budget``. The runs are written
            into ``out``, by default the next free ``runs/<data>-seeds-<n>``.

    Returns:
        The summary, which is also written as ``summary.json``.

    Raises:
        UsageError, ConvlensError, DivergenceError: As :func:`convlens.train`.
    """
    request = TrainRequest.create(data, recipe, **options)
    with preserve_rng_state():
        return RunGroup.start(request, seeds=n).run(show_progress=show_progress)


def cross_validate(
    data: Any, folds: int, recipe: str | Recipe | None = None, *, show_progress: bool = False, **options: Any
) -> GroupSummary:
    """Train one run for each of ``folds`` folds, so that every image is tested once.

    Args:
        data: Whatever :func:`convlens.load_dataset` takes; its splits are merged.
        folds: Number of folds, at least 2.
        recipe: Name of a recipe, a Recipe, or None for the default of the data.
        show_progress: Show a progress bar on standard error.
        **options: Other arguments of :func:`convlens.train`, except ``init_from`` and ``budget``. The runs are written
            into ``out``, by default the next free ``runs/<data>-folds-<n>``.

    Returns:
        The summary, which is also written as ``summary.json``; ``pooled`` is the accuracy over all images.

    Raises:
        UsageError, ConvlensError, DivergenceError: As :func:`convlens.train`.
    """
    request = TrainRequest.create(data, recipe, **options)
    with preserve_rng_state():
        return RunGroup.start(request, folds=folds).run(show_progress=show_progress)
