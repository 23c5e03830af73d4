"""A sweep: its folder, its plan, its data without test images, and the Optuna study that all workers share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError

from convlens.data.dataset import Dataset, Split
from convlens.data.loader import require_balance
from convlens.data.loading import data_name, load_dataset, refuse_inside_data, require_size
from convlens.distributed.process_group import require_single_process
from convlens.errors import UsageError
from convlens.run_dir import RunDir, require_new_path
from convlens.runs.artifacts import current_command
from convlens.sweep.space import Space, display_name, parse_space
from convlens.sweep.storage import absolute_storage, open_storage
from convlens.sweep.validation import require_trainable
from convlens.system.device import select_device
from convlens.system.files import read_json, write_json
from convlens.system.text import quoted
from convlens.training.pretrained import reject_pretrained
from convlens.training.recipe import Recipe
from convlens.training.recipes import default_recipe, get_recipe

PLAN = "sweep.json"
JOURNAL = "journal.log"
WARM_UP_TRIALS = 5  # that finish before any is pruned
PER_MACHINE = ("device", "threads")  # fields of the base recipe that may differ between those who share a sweep

optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # convlens reports instead


@dataclass(eq=False)
class Sweep:
    """A search: its plan and the study that holds all trials."""

    folder: Path
    plan: dict[str, Any]  # the content of sweep.json
    base: Recipe
    space: Space
    data: Dataset  # its test split is empty: no trial can use it
    study: optuna.Study
    joined: bool = False  # another process created the study; that one confirms the best trial

    @classmethod
    def create(
        cls,
        data: Any,
        recipe: str | Recipe | None = None,
        *,
        params: Iterable[str] = (),
        trials: int = 20,
        storage: str | None = None,
        out: str | Path | None = None,
        allow_unreadable: bool = False,
        **overrides: Any,
    ) -> Sweep:
        """Plan ``trials`` trials in the space of ``params``, around a base recipe with ``overrides``.

        ``storage`` is the URL of a database that several processes or machines share, with ``$NAME`` taken from the
        environment; a study of the same search is joined. By default it is a journal file in the folder, ``out``
        or the next free ``runs/<data>-sweep-<n>``. Raises UsageError for what cannot work, before anything is written.
        """
        require_single_process("a sweep")
        if trials < 1:
            raise UsageError(f"`trials` is {trials}; it must be at least 1")
        if out is not None:
            require_new_path(out)
        space = parse_space(params)
        if not space:
            raise UsageError("name what to search, such as lr=1e-3..1:log")
        for name in space.keys() & overrides.keys():
            raise UsageError(f"`{display_name(name)}` is both searched and fixed")
        if not isinstance(recipe, Recipe):
            recipe = get_recipe(recipe) if recipe else default_recipe(data_name(data))
        base = recipe.override(**{**overrides, "log_test_metrics": False, "save_snapshots": False, "save_every": 0})
        reject_pretrained(base, "a sweep")
        select_device(base.device)
        dataset = load_for_sweep(data, base, allow_unreadable)
        refuse_inside_data(out, dataset)
        require_trainable(base, dataset, space, overrides)
        plan: dict[str, Any] = {
            "convlens": version("convlens"),
            "command": current_command(),
            "data": dataset.source,
            "data_name": dataset.name,
            "allow_unreadable": allow_unreadable,
            "fingerprint": dataset.fingerprint(),
            "recipe": dataclasses.asdict(base),
            "space": {name: str(values) for name, values in space.items()},
            "trials": trials,
            "storage": None if storage is None else absolute_storage(storage),
        }
        if storage is not None:  # what cannot be opened leaves no folder
            study, joined = open_study(plan, plan["storage"])
        folder = RunDir.create(out, f"{dataset.name}-sweep").path
        if storage is None:
            study, joined = open_study(plan, str(folder / JOURNAL))
        write_json(folder / PLAN, plan)
        return cls(folder, plan, base, space, dataset, study, joined)

    @classmethod
    def resume(cls, path: str | Path, *, trials: int | None = None) -> Sweep:
        """Set up a sweep to continue, to ``trials`` in all (None: as planned).

        Raises UsageError if ``path`` is not a sweep, or its data have changed or were in memory.
        """
        require_single_process("a sweep")
        folder = Path(path)
        if not (folder / PLAN).is_file():
            raise UsageError(f"{path} is not the folder of a sweep: it has no {PLAN}")
        plan = read_json(folder / PLAN)
        base, space = Recipe.from_json(plan["recipe"]), parse_space(f"{n}={text}" for n, text in plan["space"].items())
        if plan["data"] is None:
            raise UsageError(f"the data of {path} were objects in memory; only data on disk can be resumed")
        dataset = load_for_sweep(plan["data"], base, plan["allow_unreadable"])
        if dataset.fingerprint() != plan["fingerprint"]:
            raise UsageError(f"the data of {path} have changed since it was started; make a new sweep")
        study, _ = open_study(plan, plan["storage"] or str(folder / JOURNAL))
        if trials is not None and trials != plan["trials"]:
            plan["trials"] = trials
            write_json(folder / PLAN, plan)
        return cls(folder, plan, base, space, dataset, study)

    @property
    def command(self) -> str:
        """The command that resumes it."""
        return f"convlens sweep --resume {quoted(self.folder)}"


def load_for_sweep(data: Any, base: Recipe, allow_unreadable: bool) -> Dataset:
    """Return the data with the recipe's validation split and an empty test split."""
    dataset = load_dataset(data, image_size=base.image_size, allow_unreadable=allow_unreadable)
    dataset = dataclasses.replace(
        dataset, test=Split(images=dataset.train.images[:0], labels=dataset.train.labels[:0], ids=[])
    )
    require_size(base.image_size, dataset)
    if base.balanced_sampling:
        require_balance(dataset.train)
    dataset = dataset.with_validation(base.val_fraction, base.seed)
    if dataset.validation is None:
        raise UsageError("a sweep compares trials on validation images: set `val_fraction` above 0, such as 0.1")
    return dataset


def open_study(plan: dict[str, Any], storage: str) -> tuple[optuna.Study, bool]:
    """Return the study of a plan, and whether it was there already; ConvlensError if its storage cannot be opened.

    Its name is a digest of the data, the space and the base recipe: only the same search shares a study.
    """
    recipe = {name: value for name, value in plan["recipe"].items() if name not in PER_MACHINE}
    search = json.dumps([plan["fingerprint"], plan["space"], recipe], sort_keys=True)
    warm_up_epochs = max((plan["recipe"]["epochs"] or 0) // 5, 1)
    options: dict[str, Any] = {
        "storage": open_storage(storage),
        "study_name": f"convlens-{hashlib.sha256(search.encode()).hexdigest()[:16]}",
        "pruner": optuna.pruners.MedianPruner(WARM_UP_TRIALS, warm_up_epochs),
    }
    try:
        study = optuna.create_study(direction="maximize", **options)
    except DuplicatedStudyError:
        return optuna.load_study(**options), True
    # the base recipe comes first, as far as it lies in the space: the search has to beat it
    space = parse_space(f"{name}={text}" for name, text in plan["space"].items())
    own = {name: plan["recipe"][name] for name in space if plan["recipe"][name] is not None}
    study.enqueue_trial({name: value for name, value in own.items() if value in space[name]})
    return study, False
