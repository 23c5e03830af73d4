"""A sweep: its folder, its plan, its data without the test images, and the Optuna study that all workers share."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage

from convlens.data.dataset import Dataset, Split
from convlens.data.loader import require_balance
from convlens.data.loading import data_name, load_dataset, refuse_inside_data, require_size
from convlens.data.preprocess import Preprocess
from convlens.distributed.process_group import require_single_process
from convlens.errors import UsageError
from convlens.run_dir import RunDir, require_new_path
from convlens.runs.artifacts import current_command
from convlens.sweep.space import PRESETS, Space, parse_space, read_space, space_texts
from convlens.sweep.storage import absolute_storage, open_storage
from convlens.sweep.validation import Check
from convlens.system.device import select_device
from convlens.system.files import read_json, write_json
from convlens.system.text import quoted
from convlens.training.pretrained import reject_pretrained
from convlens.training.recipe import FIELD_TYPES, Recipe, flag
from convlens.training.recipes import default_recipe, get_recipe

STUDY = "convlens"  # one sweep in a storage, under this name
PLAN = "sweep.json"
JOURNAL = "journal.log"
WARM_UP = 5  # trials that come to their end before any is pruned
MACHINE = ("device", "threads")  # of the base recipe, what may differ between those who share a sweep
PATIENCE = 30.0  # seconds that another process has to set up what it began

optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # the command says what is to be said


@dataclass(eq=False)
class Sweep:
    """What is searched, on what, from which recipe, and the study where all trials are kept."""

    folder: Path
    plan: dict[str, Any]  # what sweep.json says
    base: Recipe
    space: Space
    data: Dataset  # its test split is empty: no trial can look at it
    study: optuna.Study
    joined: bool  # others had begun it
    notes: tuple[str, ...] = ()

    @cached_property
    def preprocess(self) -> Preprocess:
        """What stands between images and the nets: the same for every trial."""
        return Preprocess.fit(self.data.train.images, self.data.input_style)

    @classmethod
    def create(
        cls,
        data: Any,
        recipe: str | Recipe | None = None,
        *,
        params: Iterable[str] = (),
        preset: str | None = None,
        trials: int = 20,
        storage: str | None = None,
        out: str | Path | None = None,
        allow_unreadable: bool = False,
        **overrides: Any,
    ) -> Sweep:
        """Plan ``trials`` trainings in the space of ``params`` and ``preset``; begin or join the study in ``storage``.

        ``storage`` is a database URL, in which $NAME is taken from the environment, or a journal file; by default a
        file in the new folder. Raises UsageError for whatever cannot work, before anything runs or is written.
        """
        require_single_process("a sweep")
        if trials < 1:
            raise UsageError(f"--trials is {trials}; it must be at least 1")
        if out is not None:
            require_new_path(out)
        space = parse_space(params)
        if not space and preset is None:
            raise UsageError("say what to search: --param lr=1e-3..1:log, as often as you like, or --preset classic")
        if preset is not None and preset not in PRESETS:
            raise UsageError(f"unknown preset {preset!r}; choose from: {', '.join(PRESETS)}")
        base = (
            recipe if isinstance(recipe, Recipe) else get_recipe(recipe) if recipe else default_recipe(data_name(data))
        )
        base = base.override(**{**overrides, "log_test_metrics": False, "save_snapshots": False, "save_every": 0})
        for name in set(space) & set(overrides):
            raise UsageError(f"{flag(name)} is searched and fixed: give it once")
        reject_pretrained(base, "a sweep")
        select_device(base.device)
        dataset = load_for_sweep(data, base, allow_unreadable)
        refuse_inside_data(out, dataset)
        check = Check(base, dataset)
        check.require_plan(space, overrides)
        notes: list[str] = []
        for name, values in parse_space(PRESETS[preset] if preset else ()).items():
            if name not in space and name not in overrides:
                fitting = check.fit_preset(name, values, space, notes)
                space |= {} if fitting is None else {name: fitting}
        check.require_values(space)
        plan: dict[str, Any] = {
            "convlens": version("convlens"),
            "command": current_command(),
            "data": dataset.source,
            "data_name": dataset.name,
            "allow_unreadable": allow_unreadable,
            "fingerprint": dataset.fingerprint(),
            "recipe": dataclasses.asdict(base),
            "space": space_texts(space),
            "trials": trials,
            "storage": None if storage is None else absolute_storage(storage),
        }
        if storage is not None:  # another's study is refused before there is a folder
            study, joined = join_study(open_storage(plan["storage"]), plan, storage)
        folder = RunDir.create(out, f"{dataset.name}-sweep").path
        if storage is None:
            study, joined = join_study(open_storage(str(folder / JOURNAL)), plan, str(folder / JOURNAL))
        write_json(folder / PLAN, plan)
        return cls(folder, plan, base, space, dataset, study, joined, tuple(notes))

    @classmethod
    def resume(cls, path: str | Path, *, trials: int | None = None) -> Sweep:
        """Set up a sweep to go on, to ``trials`` in all (None: as planned); UsageError if the data have changed."""
        require_single_process("a sweep")
        folder = Path(path)
        if not (folder / PLAN).is_file():
            raise UsageError(f"{path} is not the folder of a sweep: it has no {PLAN}")
        plan = read_json(folder / PLAN)
        base, space = Recipe.from_json(plan["recipe"]), read_space(plan["space"])
        if plan["data"] is None:
            raise UsageError(f"the data of {path} were objects in memory; only data on disk can be gone on with")
        dataset = load_for_sweep(plan["data"], base, plan["allow_unreadable"])
        if dataset.fingerprint() != plan["fingerprint"]:
            raise UsageError(f"the data of {path} have changed since it was started; make a new sweep")
        storage = plan["storage"] or str(folder / JOURNAL)
        study, joined = join_study(open_storage(storage), plan, storage)
        if trials is not None and trials != plan["trials"]:
            plan["trials"] = trials
            write_json(folder / PLAN, plan)
        return cls(folder, plan, base, space, dataset, study, joined)

    @property
    def command(self) -> str:
        """What goes on with it, to be pasted."""
        return f"convlens sweep --resume {quoted(self.folder)}"


def load_for_sweep(data: Any, base: Recipe, allow_unreadable: bool) -> Dataset:
    """Return the data with the recipe's validation split and without a single test image."""
    dataset = load_dataset(data, image_size=base.image_size, allow_unreadable=allow_unreadable)
    dataset = dataclasses.replace(
        dataset, test=Split(images=dataset.train.images[:0], labels=dataset.train.labels[:0], ids=[])
    )
    require_size(base.image_size, dataset)
    if base.balanced_sampling:
        require_balance(dataset.train)
    dataset = dataset.with_validation(base.val_fraction, base.seed)
    if dataset.validation is None:
        raise UsageError("a sweep chooses on validation images, and this recipe holds none out: add --val-fraction 0.1")
    return dataset


def identity(plan: dict[str, Any]) -> dict[str, Any]:
    """Return what all who share a study must have in common."""
    recipe = {name: value for name, value in plan["recipe"].items() if name not in MACHINE}
    return {"fingerprint": plan["fingerprint"], "space": plan["space"], "recipe": recipe}


def join_study(storage: BaseStorage, plan: dict[str, Any], name: str) -> tuple[optuna.Study, bool]:
    """Return the study in ``storage``, made if there is none, and whether others had begun it.

    Raises UsageError if it is one of other data, another space or another recipe.
    """
    mine = identity(plan)
    pruner = optuna.pruners.MedianPruner(
        n_startup_trials=WARM_UP, n_warmup_steps=max((plan["recipe"]["epochs"] or 0) // 5, 1)
    )
    try:
        study = optuna.create_study(storage=storage, study_name=STUDY, direction="maximize", pruner=pruner)
    except DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=STUDY, pruner=pruner)
        patient_until = time.monotonic() + PATIENCE
        while "sweep" not in study.user_attrs and time.monotonic() < patient_until:
            time.sleep(0.1)
        refuse_another(study.user_attrs.get("sweep", {}), mine, name)
        return study, True
    # the recipe itself comes first, as far as it lies in the space: what is found is to be better than that
    known = {name: plan["recipe"][name] for name in plan["space"] if plan["recipe"][name] is not None}
    space = read_space(plan["space"])
    study.enqueue_trial({name: value for name, value in known.items() if value in space[name]})
    study.set_user_attr("sweep", mine)
    return study, False


def refuse_another(theirs: dict[str, Any], mine: dict[str, Any], name: str) -> None:
    """Raise UsageError that says in what a study differs from the sweep that would join it."""
    if theirs == mine:
        return
    why = "other data"
    for key, what in (("space", "another space"), ("recipe", "another base recipe")):
        there, here = theirs.get(key, {}), mine[key]
        for field in (f for f in {**there, **here} if f in FIELD_TYPES and there.get(f) != here.get(f)):
            why = f"{what} ({flag(field)[2:]} is {there.get(field)} there and {here.get(field)} here)"
    raise UsageError(f"{name} holds a sweep of {why}; name another --storage")
