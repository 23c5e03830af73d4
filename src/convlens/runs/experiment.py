"""One experiment from data to report: what ``convlens train`` runs."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convlens.data.dataset import Dataset
from convlens.data.loader import require_balance
from convlens.data.loading import data_name, load_dataset, load_recorded, refuse_inside_data, require_size
from convlens.data.preprocess import Preprocess
from convlens.distributed.process_group import World, init_world, launch_id
from convlens.errors import UsageError
from convlens.models import count_parameters
from convlens.run_dir import RunDir
from convlens.runs.artifacts import current_command, describe_data, write_metrics, write_split
from convlens.runs.finalize import finalize
from convlens.runs.resume import environment_diff, find_interrupted_run, read_config, recorded_device
from convlens.runs.run import Run
from convlens.system.device import select_device, set_num_threads, system_info
from convlens.system.files import read_name_list, write_json, write_name_list
from convlens.system.hardware import available_cores
from convlens.system.random import preserve_rng_state
from convlens.training.build import drop_unsupported_options, freeze, make_model, model_config, require_possible
from convlens.training.callbacks import (
    Callback,
    LiveStatus,
    ProgressBarCallback,
    SnapshotCallback,
    StopWhen,
    TensorBoardLogger,
    find_tensorboard,
)
from convlens.training.checkpoint import CheckpointStore
from convlens.training.loop import fit
from convlens.training.precision import choose_precision
from convlens.training.pretrained import input_spec, load_matching_weights, start_from_model, start_from_weights
from convlens.training.recipe import LENGTHS, Recipe
from convlens.training.recipes import default_recipe, get_recipe
from convlens.training.state import EpochRecord
from convlens.training.time_budget import budget_candidates, choose_for_budget, parse_budget


@dataclass(eq=False)
class Experiment:
    """A training that is set up: iterate :meth:`epochs`, then call :meth:`finish`."""

    folder: RunDir
    config: dict[str, Any]
    recipe: Recipe
    dataset: Dataset  # with its validation split
    preprocess: Preprocess
    net: nn.Module
    ranks: World = field(default_factory=init_world)

    @classmethod
    def create(
        cls,
        data: Any,
        recipe: str | Recipe | None = None,
        *,
        out: str | Path | None = None,
        init_from: str | Path | None = None,
        allow_unreadable: bool = False,
        budget: float | str | None = None,
        exclude: str | Path | None = None,
        started: float | None = None,
        **overrides: Any,
    ) -> Experiment:
        """Load the data, settle the recipe, build the net and make the run folder.

        ``recipe`` is a name, a Recipe, or None for the default of the data; ``overrides`` are recipe options.
        ``init_from`` names a run or model whose stages the net starts from, with a new head. ``budget`` is the
        time that everything may take (seconds, or "5m"), counted from ``started`` (time.perf_counter; by default now).
        ``exclude`` is a file that names images to leave out, as the data doctor writes it.

        Of several processes that torchrun has started, the first does all that, and the others follow it; if it takes
        the place of one that has died, it goes on with the run that the job has begun.
        """
        ranks = init_world()
        if not ranks.is_main:
            return cls._follow(data, ranks)
        with ranks.planning():
            if budget is not None and ranks.size > 1:
                raise UsageError("--budget measures the pace of one process; give several of them --max-seconds")
            training = launch_id()
            if ranks.is_restart and (begun := find_interrupted_run(out, training)):
                return cls._go_on(begun, memory_of(data), accept_changes=True, finished_too=True)._lead()
            return cls._begin(
                data,
                recipe,
                out=out,
                init_from=init_from,
                allow_unreadable=allow_unreadable,
                budget=budget,
                exclude=exclude,
                started=started,
                training=training,
                **overrides,
            )._lead()

    @classmethod
    def _begin(
        cls,
        data: Any,
        recipe: str | Recipe | None,
        *,
        out: str | Path | None,
        init_from: str | Path | None,
        allow_unreadable: bool,
        budget: float | str | None,
        exclude: str | Path | None,
        started: float | None,
        training: str | None,
        **overrides: Any,
    ) -> Experiment:
        """Do what :meth:`create` says; ``training`` is the name of this one among those of torchrun."""
        started = time.perf_counter() if started is None else started
        allowed = None if budget is None else parse_budget(str(budget))  # seconds
        if budget is not None and any(overrides.get(name) is not None for name in LENGTHS):
            raise UsageError("--budget decides the length; give no --epochs, --max-steps or --max-seconds beside it")
        if out is not None:
            RunDir.refuse_existing(out)
        if isinstance(recipe, str):
            recipe = get_recipe(recipe)
        elif not isinstance(recipe, Recipe | None):
            raise UsageError(f"a recipe is a name or a Recipe, not a {type(recipe).__name__}; arrays go as one: (x, y)")
        start = start_from_model(init_from) if init_from is not None else None

        def settle(recipe: Recipe) -> Recipe:
            if start is not None and start.options is not None:
                recipe = recipe.override(**start.options)
            return drop_unsupported_options(recipe.override(**overrides), overrides)

        settled = settle(recipe or default_recipe(data_name(data)))
        if start is not None and settled.pretrained:
            raise UsageError("--init-from or --pretrained, not both: each says what weights to start from")
        start = start or start_from_weights(settled)
        if settled.freeze and start is None:
            raise UsageError("--freeze leaves trained stages as they are; name them with --pretrained or --init-from")
        if settled.tensorboard:
            find_tensorboard()
        refuse_inside_data(out, data)
        device = select_device(settled.device)
        threads = set_num_threads(settled.threads)
        # what was resolved is what is recorded: a resumed run computes as the first part did
        settled = settled.override(device=device.type, threads=threads)

        form = input_spec(settled, start)
        loaded = load_dataset(data, **form, allow_unreadable=allow_unreadable)
        if exclude is not None:
            loaded = loaded.drop(read_name_list(exclude))
        if settled.balanced_sampling:
            require_balance(loaded.train)
        require_size(settled.image_size, loaded)
        if loaded.shape[1] == form["image_size"]:
            settled = settled.override(image_size=form["image_size"])
        if allowed is not None:
            running = {"device": device.type, "threads": threads, "image_size": settled.image_size}
            choices = [settle(choice).override(**running) for choice in budget_candidates(data_name(data), recipe)]
            settled = choose_for_budget(allowed, started, loaded, choices)
        dataset = loaded.with_validation(settled.val_fraction, settled.seed)
        preprocess = Preprocess.fit(dataset.train.images, dataset.input_style)
        if start is not None:
            if settled.pretrained:
                settled = settled.override(pretrained=start.origin)  # which holds in another folder too
            preprocess = start.normalise(preprocess)
        torch.manual_seed(settled.seed)
        model = model_config(settled, dataset)
        net = make_model(model, dataset, preprocess)
        for part in ("features", "head"):  # what a test asks of a net that training does not
            if not hasattr(net, part):
                raise UsageError(f"model {settled.model!r} has no {part!r}; convlens.models.check_model says more")
        require_possible(settled, net, dataset)  # fit() would say it too, but then there is a run
        freeze(net, settled)
        settled = settled.override(precision=choose_precision(settled, device, net, dataset.shape))
        config = {
            "convlens": version("convlens"),
            "command": current_command(),
            "recipe": dataclasses.asdict(settled),
            "model": {**model, "parameters": count_parameters(net)},
            "data": describe_data(dataset, loaded.fingerprint()),
            "preprocess": preprocess.to_json(),
            "machine": system_info(device),
            **({"job": training} if training else {}),
        }
        if start is not None:
            config["init"] = {"from": start.origin, "tensors": load_matching_weights(net, start, settled.freeze)}
        folder = RunDir.create(out, dataset.name)
        try:
            write_split(folder, dataset)
            if loaded.excluded:
                write_name_list(folder.excluded, dict.fromkeys(loaded.excluded, ""))
            write_json(folder.config, config)  # last: with it, the folder is a run that can be resumed
        except BaseException:  # Ctrl-C too
            shutil.rmtree(folder.path, ignore_errors=True)
            raise
        return cls(folder, config, settled, dataset, preprocess, net)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        data: Any = None,
        *,
        allow_unreadable: bool = False,
        accept_changes: bool = False,
        finished_too: bool = False,
    ) -> Experiment:
        """Set up the unfinished training in a run folder to go on; UsageError if it is finished or data changed.

        A finished one is taken with ``finished_too``: nothing is left to do then. ``data`` is what it was trained on,
        where that is not on disk. Where this machine would compute other digits than the one that it was started on,
        UsageError says so, unless ``accept_changes``; config.json records them.
        """
        ranks = init_world()
        if not ranks.is_main:
            return cls._follow(data, ranks)
        with ranks.planning():
            return cls._go_on(
                path,
                data,
                allow_unreadable=allow_unreadable,
                accept_changes=accept_changes,
                finished_too=finished_too,
            )._lead()

    @classmethod
    def _go_on(
        cls,
        path: str | Path,
        data: Any,
        *,
        allow_unreadable: bool = False,
        accept_changes: bool,
        finished_too: bool,
    ) -> Experiment:
        """Do what :meth:`resume` says."""
        folder = RunDir.open(path)
        config = folder.read_config()
        if folder.report.exists() and not finished_too:
            raise UsageError(f"the training of {path} is finished; nothing to resume")
        read_config(folder, config)  # is it whole?
        changes = environment_diff(path, config, accept=accept_changes)
        left_out = read_name_list(folder.excluded) if folder.excluded.exists() else []
        device, settled = recorded_device(config), config["recipe"]
        if device.type != settled["device"]:
            settled |= {"device": device.type, "precision": "auto"}
        again = cls._rebuild(folder, config, data, left_out, allow_unreadable=allow_unreadable)
        settled["precision"] = choose_precision(again.recipe, device, again.net, again.dataset.shape)
        again.recipe = again.recipe.override(precision=settled["precision"])
        if not folder.split.exists():
            write_split(folder, again.dataset)
        if new := [change for change in changes if change not in config.get("resumed", [])]:
            config["resumed"] = [*config.get("resumed", []), *new]
            with folder.claimed():
                write_json(folder.config, config)
        if "init" in config and not any(folder.checkpoint.glob("*.json")):
            load_matching_weights(
                again.net, start_from_weights(again.recipe) or start_from_model(config["init"]["from"])
            )
        return again

    @classmethod
    def _rebuild(
        cls, folder: RunDir, config: dict[str, Any], data: Any, left_out: list[str], *, allow_unreadable: bool
    ) -> Experiment:
        """Load the data and build the net that a run's config.json tells of; UsageError if the data have changed."""
        recipe, preprocess = read_config(folder, config)
        recorded, model = config["data"], config["model"]
        if data is None and recorded["source"] is None:
            raise UsageError(f"the data of {folder.path} were objects in memory; only data on disk can be resumed")
        loaded = load_recorded(
            recorded,
            data,
            exclude=left_out,
            image_size=recipe.image_size,
            channels=preprocess.channels,
            allow_unreadable=allow_unreadable or bool(recorded["unreadable"]),
        )
        if loaded.fingerprint() != recorded["fingerprint"]:
            raise UsageError(
                f"the data in {recorded['source'] or loaded.name} have changed since {folder.path} was started; "
                "train anew"
            )
        dataset = loaded.with_validation(recipe.val_fraction, recipe.seed)
        torch.manual_seed(recipe.seed)  # the first weights again, should no checkpoint have been written yet
        return cls(folder, config, recipe, dataset, preprocess, make_model(model, dataset, preprocess))

    def _lead(self) -> Experiment:
        """Tell the other processes what to train."""
        self.ranks.lead([str(self.folder.path), self.config, list(self.dataset.excluded)])
        return self

    @classmethod
    def _follow(cls, data: Any, ranks: World) -> Experiment:
        """Set up what the first process has decided."""
        path, config, left_out = ranks.receive_plan()
        set_num_threads(min(config["recipe"]["threads"], available_cores()))
        return cls._rebuild(RunDir(path), config, memory_of(data), left_out, allow_unreadable=True)

    def epochs(
        self, *, should_stop: Callable[[], bool] = lambda: False, show_progress: bool = False
    ) -> Iterator[EpochRecord]:
        """Train; yield one record an epoch (those of an interrupted run first), keeping ``metrics.csv`` up to date."""
        records: list[EpochRecord] = []
        watcher = Callback()
        if self.ranks.first:
            watcher = LiveStatus(self.folder, self.dataset, self.preprocess.normalizer(), self.recipe)
        tensorboard = self.recipe.tensorboard and self.ranks.first
        with (
            self.folder.claimed() if self.ranks.first else contextlib.nullcontext(),
            contextlib.closing(TensorBoardLogger(self.folder.tensorboard, wanted=tensorboard)) as board,
        ):
            for record in fit(
                self.net,
                self.dataset,
                self.recipe,
                preprocess=self.preprocess,
                checkpoints=CheckpointStore(self.folder.checkpoint),
                callbacks=[StopWhen(should_stop), *(self._callbacks(show_progress) if self.ranks.is_main else [])],
            ):
                records.append(record)
                if self.ranks.is_main:
                    write_metrics(self.folder, records, watched=self.recipe.log_test_metrics)
                yield record

    def _callbacks(self, show_progress: bool) -> list[Callback]:
        """Return the callbacks of rank 0."""
        normalize = self.preprocess.normaliser()
        callbacks: list[Callback] = [LiveStatus(self.folder, self.dataset, normalize, self.recipe.batch_size)]
        if self.recipe.save_snapshots:
            callbacks.append(SnapshotCallback(self.folder.snapshots))
        if self.recipe.tensorboard:
            callbacks.append(TensorBoardLogger(self.folder.tensorboard))
        if show_progress:
            callbacks.append(ProgressBarCallback())
        return callbacks

    def finish(self) -> Run:
        """Measure the test split, once; write bundle, ``test.json``, ``predictions.csv``, plots and report."""
        if self.ranks.is_main:
            with self.folder.claimed():
                if not self.folder.report.exists():  # else another process has finished it
                    finalize(self.folder, self.config, self.recipe, self.dataset, self.preprocess, self.net)
        self.ranks.broadcast(None)  # the others wait for it
        return Run(self.folder.path)


def train(
    data: Any,
    recipe: str | Recipe | None = None,
    *,
    out: str | Path | None = None,
    init_from: str | Path | None = None,
    allow_unreadable: bool = False,
    budget: float | str | None = None,
    exclude: str | Path | None = None,
    show_progress: bool = False,
    **overrides: Any,
) -> Run:
    """Train a classifier on ``data`` and return the finished Run: folder, figures, net.

    ``data`` is whatever :func:`convlens.load_dataset` takes; ``recipe`` a name, a Recipe, or None for the default of
    the data; ``overrides`` are recipe options, such as ``epochs=3, seed=1``. The run lies in ``out``, a new folder, or
    the next free ``runs/<data>-<n>``. ``init_from`` names a run or model whose stages the net starts from, with a
    new head. ``budget`` is the time that all of it may take (seconds, or "5m"): the recipe, if none is given, and the
    length are chosen to fit, and the images are tested once unless ``tta=True``.
    ``exclude`` is a file that names images to leave out, one a line, as the data doctor writes it. ``allow_unreadable``
    trains although more than 1% of a folder's files cannot be read. PyTorch's random numbers and threads are left as
    they were; on a CPU, with glibc, the process keeps the memory that it frees from then on. Raises UsageError for what
    was asked wrongly, ConvlensError for data that cannot be read or a disk that is full, Diverged when the loss is no
    number any more: one line each, that says what to do.
    """
    with preserve_rng_state():
        experiment = Experiment.create(
            data,
            recipe,
            out=out,
            init_from=init_from,
            allow_unreadable=allow_unreadable,
            budget=budget,
            exclude=exclude,
            **overrides,
        )
        for _ in experiment.epochs(show_progress=show_progress):
            pass
        return experiment.finish()


def memory_of(data: Any) -> Any:
    """Return data that are objects in memory, and None for what can be found again by its name or path."""
    return None if isinstance(data, (str, Path)) else data
