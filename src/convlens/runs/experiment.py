"""One training from data to report, as ``convlens train`` runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
from convlens.run_dir import RunDir, require_new_path
from convlens.runs.artifacts import current_command, current_version, describe_data, write_metrics, write_split
from convlens.runs.config import InitFrom, RunConfig
from convlens.runs.finalize import finalize
from convlens.runs.request import TrainRequest
from convlens.runs.resume import (
    environment_diff,
    find_interrupted_run,
    recorded_device,
    require_data_on_disk,
    require_same_data,
)
from convlens.runs.run import Run
from convlens.system.device import select_device, set_num_threads, system_info
from convlens.system.files import read_name_list, write_name_list
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
from convlens.training.pretrained import (
    PretrainedWeights,
    input_spec,
    load_matching_weights,
    start_from_model,
    start_from_weights,
)
from convlens.training.recipe import Recipe
from convlens.training.recipes import default_recipe, get_recipe
from convlens.training.state import EpochRecord
from convlens.training.time_budget import budget_candidates, choose_for_budget, parse_budget


@dataclass(eq=False)
class Experiment:
    """A training that is ready to run: call :meth:`run`, or iterate :meth:`epochs` and call :meth:`finish`."""

    run_dir: RunDir
    config: RunConfig
    dataset: Dataset  # with its validation split
    model: nn.Module
    world: World = field(default_factory=init_world)

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.config.recipe

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing that travels with the model."""
        return self.config.preprocess

    @classmethod
    def start(cls, request: TrainRequest) -> Experiment:
        """Load the data, resolve the recipe, build the model and create the run folder.

        Rank 0 does this and broadcasts the result; other ranks join it. If torchrun restarts a job, rank 0 resumes the
        run that the job had started.

        Raises:
            UsageError: The request cannot be fulfilled; no folder is left behind.
            ConvlensError: The data cannot be read.
        """
        world = init_world()
        if not world.is_main:
            return cls.join(request.data, world)
        with world.planning():
            if request.budget is not None:
                if world.size > 1:
                    raise UsageError("`budget` works with one process only; give several of them `max_seconds`")
                request = dataclasses.replace(request, budget=parse_budget(str(request.budget)))
            job = launch_id()
            if world.is_restart and (interrupted := find_interrupted_run(request.out, job)):
                data = in_memory(request.data)
                return cls._reopen(interrupted, data, accept_changes=True, finished_too=True)._broadcast()
            if request.out is not None:
                require_new_path(request.out)
            refuse_inside_data(request.out, request.data)
            recipe, pretrained = resolve_recipe(request)
            loaded, recipe = load_training_data(request, recipe, pretrained)
            config, dataset, model = build_model(recipe, loaded, pretrained)
            return cls._create(request, dataclasses.replace(config, launch_id=job or None), dataset, model)._broadcast()

    @classmethod
    def _create(cls, request: TrainRequest, config: RunConfig, dataset: Dataset, model: nn.Module) -> Experiment:
        """Create the run folder and write what is known before training."""
        run_dir = RunDir.create(request.out, dataset.name)
        try:
            write_split(run_dir, dataset)
            if dataset.excluded:
                write_name_list(run_dir.excluded, dict.fromkeys(dataset.excluded, ""))
            config.write(run_dir.config)  # last: it makes the folder a run that can be resumed
        except BaseException:  # including Ctrl-C
            shutil.rmtree(run_dir.path, ignore_errors=True)
            raise
        return cls(run_dir, config, dataset, model)

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
        """Prepare an interrupted training to continue.

        Args:
            path: Run folder.
            data: The data that it was trained on, if they are not on disk.
            allow_unreadable: Accept a folder of which more than 1% of the files cannot be read.
            accept_changes: Accept another device, processor, or version, which may change the last digits;
                ``config.json`` records the changes.
            finished_too: Accept a finished run; nothing is left to do then.

        Raises:
            UsageError: The run is finished, its data have changed, or the environment differs.
        """
        world = init_world()
        if not world.is_main:
            return cls.join(data, world)
        with world.planning():
            return cls._reopen(
                path,
                data,
                allow_unreadable=allow_unreadable,
                accept_changes=accept_changes,
                finished_too=finished_too,
            )._broadcast()

    @classmethod
    def join(cls, data: Any, world: World) -> Experiment:
        """Prepare the training that rank 0 has broadcast, on another rank."""
        path, values, excluded = world.receive_plan()
        config = RunConfig.from_json(values)
        set_num_threads(min(config.recipe.threads, available_cores()))
        return cls._rebuild(RunDir(path), config, in_memory(data), excluded, allow_unreadable=True)

    def _broadcast(self) -> Experiment:
        """Send what is trained to the other ranks."""
        self.world.broadcast_plan([str(self.run_dir.path), self.config.to_json(), list(self.dataset.excluded)])
        return self

    @classmethod
    def _reopen(
        cls,
        path: str | Path,
        data: Any,
        *,
        allow_unreadable: bool = False,
        accept_changes: bool,
        finished_too: bool,
    ) -> Experiment:
        """Resume on rank 0; see :meth:`resume`."""
        run_dir = RunDir.open(path)
        config = RunConfig.read(run_dir.config)
        if run_dir.report.exists() and not finished_too:
            raise UsageError(f"the training of {path} is finished; nothing to resume")
        changes = environment_diff(path, config, accept=accept_changes)
        excluded = read_name_list(run_dir.excluded) if run_dir.excluded.exists() else []
        device = recorded_device(config)
        if device.type != config.recipe.device:
            config = dataclasses.replace(config, recipe=config.recipe.override(device=device.type, precision="auto"))
        again = cls._rebuild(run_dir, config, data, excluded, allow_unreadable=allow_unreadable)
        precision = choose_precision(config.recipe, device, again.model, again.dataset.shape)
        config = dataclasses.replace(config, recipe=config.recipe.override(precision=precision))
        if not run_dir.split.exists():
            write_split(run_dir, again.dataset)
        if new := tuple(change for change in changes if change not in config.environment_changes):
            config = dataclasses.replace(config, environment_changes=(*config.environment_changes, *new))
            with run_dir.locked():
                config.write(run_dir.config)
        again.config = config
        if config.init_from and not any(run_dir.checkpoint.glob("*.json")):
            pretrained = start_from_weights(config.recipe) or start_from_model(config.init_from.source)
            load_matching_weights(again.model, pretrained)
        return again

    @classmethod
    def _rebuild(
        cls, run_dir: RunDir, config: RunConfig, data: Any, excluded: list[str], *, allow_unreadable: bool
    ) -> Experiment:
        """Load the data and build the model of a run; UsageError if the data have changed."""
        recipe, recorded = config.recipe, config.data
        loaded = load_recorded(
            recorded,
            require_data_on_disk(run_dir.path, recorded["source"], data),
            exclude=excluded,
            image_size=recipe.image_size,
            channels=config.preprocess.channels,
            allow_unreadable=allow_unreadable or bool(recorded["unreadable"]),
        )
        require_same_data(run_dir.path, loaded, recorded["fingerprint"])
        dataset = loaded.with_validation(recipe.val_fraction, recipe.seed)
        torch.manual_seed(recipe.seed)  # the same initial weights, in case there is no checkpoint yet
        return cls(run_dir, config, dataset, make_model(config.model, dataset, config.preprocess))

    def epochs(
        self, *, should_stop: Callable[[], bool] = lambda: False, show_progress: bool = False
    ) -> Iterator[EpochRecord]:
        """Train, keeping ``metrics.csv`` up to date.

        Args:
            should_stop: Called before every step; if it returns True, the training is saved and interrupted.
            show_progress: Show a progress bar on standard error.

        Yields:
            One record per epoch; after a resumption first those of the epochs before it.

        Raises:
            TrainingInterruptedError: ``should_stop`` returned True.
            DivergenceError: The loss, a gradient or a BatchNorm statistic is NaN or infinite.
        """
        records: list[EpochRecord] = []
        is_main = self.world.is_main
        callbacks = [StopWhen(should_stop), *(self._callbacks(show_progress) if is_main else [])]
        checkpoints = CheckpointStore(self.run_dir.checkpoint)
        with self.run_dir.locked() if is_main else contextlib.nullcontext():
            for record in fit(
                self.model,
                self.dataset,
                self.recipe,
                preprocess=self.preprocess,
                checkpoints=checkpoints,
                callbacks=callbacks,
            ):
                records.append(record)
                if is_main:
                    write_metrics(self.run_dir, records, log_test=self.recipe.log_test_metrics)
                yield record

    def _callbacks(self, show_progress: bool) -> list[Callback]:
        """Return the callbacks of rank 0."""
        normalize = self.preprocess.normalizer()
        callbacks: list[Callback] = [LiveStatus(self.run_dir, self.dataset, normalize, self.recipe.batch_size)]
        if self.recipe.save_snapshots:
            callbacks.append(SnapshotCallback(self.run_dir.snapshots))
        if self.recipe.tensorboard:
            callbacks.append(TensorBoardLogger(self.run_dir.tensorboard))
        if show_progress:
            callbacks.append(ProgressBarCallback())
        return callbacks

    def finish(self) -> Run:
        """Evaluate the test split, once; write the bundle, ``test.json``, ``predictions.csv``, plots and report."""
        if self.world.is_main:
            with self.run_dir.locked():
                if not self.run_dir.report.exists():  # else another process has finished it
                    finalize(self.run_dir, self.config, self.dataset, self.model)
        self.world.broadcast(None)  # the other ranks wait here
        return Run(self.run_dir.path)

    def run(self, *, show_progress: bool = False) -> Run:
        """Train to the end and finish."""
        for _ in self.epochs(show_progress=show_progress):
            pass
        return self.finish()


def resolve_recipe(request: TrainRequest) -> tuple[Recipe, PretrainedWeights | None]:
    """Return the recipe with the request's overrides and this machine's device and threads, and initial weights."""
    pretrained = start_from_model(request.init_from) if request.init_from is not None else None
    recipe = override_recipe(named_recipe(request) or default_recipe(data_name(request.data)), request, pretrained)
    if pretrained is not None and recipe.pretrained:
        raise UsageError("give `init_from` or `pretrained`, not both: each sets the initial weights")
    pretrained = pretrained or start_from_weights(recipe)
    if recipe.freeze and pretrained is None:
        raise UsageError("`freeze` keeps trained stages fixed; name their weights with `pretrained` or `init_from`")
    if recipe.tensorboard:
        find_tensorboard()
    # recorded as resolved, so that a resumed run computes like the first part
    device, threads = select_device(recipe.device), set_num_threads(recipe.threads)
    return recipe.override(device=device.type, threads=threads), pretrained


def named_recipe(request: TrainRequest) -> Recipe | None:
    """Return the recipe that was asked for, None for the default of the data."""
    return get_recipe(request.recipe) if isinstance(request.recipe, str) else request.recipe


def override_recipe(recipe: Recipe, request: TrainRequest, pretrained: PretrainedWeights | None) -> Recipe:
    """Return ``recipe`` with the model of the pretrained weights, if they name one, and the request's overrides."""
    if pretrained is not None and pretrained.options is not None:
        recipe = recipe.override(**pretrained.options)
    return drop_unsupported_options(recipe.override(**request.overrides), request.overrides)


def load_training_data(
    request: TrainRequest, recipe: Recipe, pretrained: PretrainedWeights | None
) -> tuple[Dataset, Recipe]:
    """Load the data without the excluded images; return them and the recipe with its image size and budget."""
    spec = input_spec(recipe, pretrained)
    dataset = load_dataset(request.data, **spec, allow_unreadable=request.allow_unreadable)
    if request.exclude is not None:
        dataset = dataset.drop(read_name_list(request.exclude))
    if recipe.balanced_sampling:
        require_balance(dataset.train)
    require_size(recipe.image_size, dataset)
    if dataset.shape[1] == spec["image_size"]:
        recipe = recipe.override(image_size=spec["image_size"])
    if request.budget is not None:
        resolved = {name: getattr(recipe, name) for name in ("device", "threads", "image_size")}
        candidates = budget_candidates(data_name(request.data), named_recipe(request))
        choices = [override_recipe(choice, request, pretrained).override(**resolved) for choice in candidates]
        recipe = choose_for_budget(float(request.budget), request.started, dataset, choices)
    return dataset, recipe


def build_model(
    recipe: Recipe, loaded: Dataset, pretrained: PretrainedWeights | None
) -> tuple[RunConfig, Dataset, nn.Module]:
    """Hold out the validation split and build the model; return them and the config of the run."""
    dataset = loaded.with_validation(recipe.val_fraction, recipe.seed)
    preprocess = Preprocess.fit(dataset.train.images, dataset.input_style)
    if pretrained is not None:
        if recipe.pretrained:
            recipe = recipe.override(pretrained=pretrained.origin)  # valid from any working directory
        preprocess = pretrained.normalise(preprocess)
    torch.manual_seed(recipe.seed)
    arguments = model_config(recipe, dataset)
    model = make_model(arguments, dataset, preprocess)
    for part in ("features", "head"):  # the test needs them, training does not
        if not hasattr(model, part):
            raise UsageError(f"model {recipe.model!r} has no {part!r}; see convlens.models.check_model")
    require_possible(recipe, model, dataset)  # fit() checks it too, but only after the run folder exists
    freeze(model, recipe)
    device = torch.device(recipe.device)
    recipe = recipe.override(precision=choose_precision(recipe, device, model, dataset.shape))
    init_from = None
    if pretrained is not None:
        init_from = InitFrom(pretrained.origin, load_matching_weights(model, pretrained, recipe.freeze))
    config = RunConfig(
        version=current_version(),
        command=current_command(),
        recipe=recipe,
        model={**arguments, "parameters": count_parameters(model)},
        data=describe_data(dataset, loaded.fingerprint()),
        preprocess=preprocess,
        machine=system_info(device),
        init_from=init_from,
    )
    return config, dataset, model


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
    """Train a classifier and evaluate it once on the test split.

    The random state and the number of threads of PyTorch are restored afterwards. On a CPU with glibc the process
    retains freed memory from then on.

    Args:
        data: Whatever :func:`convlens.load_dataset` takes.
        recipe: Name of a recipe, a Recipe, or None for the default of the data.
        out: New run folder; by default the next free ``runs/<data>-<n>``.
        init_from: Run or model to fine-tune: its trained stages are kept, its head is replaced.
        allow_unreadable: Train although more than 1% of a folder's files cannot be read.
        budget: Time limit of the whole call in seconds, or text such as "5m". It sets the length and, if none is
            given, the recipe; test-time augmentation is off unless ``tta=True``.
        exclude: File that lists images to leave out, one per line, as ``convlens data doctor`` writes it.
        show_progress: Show a progress bar on standard error.
        **overrides: Recipe fields, such as ``epochs=3, seed=1``.

    Returns:
        The finished run.

    Raises:
        UsageError: An argument is wrong.
        ConvlensError: The data cannot be read, or the disk is full.
        DivergenceError: The loss, a gradient or a BatchNorm statistic is NaN or infinite.
    """
    request = TrainRequest(
        data=data,
        recipe=recipe,
        overrides=overrides,
        out=out,
        init_from=init_from,
        budget=budget,
        exclude=exclude,
        allow_unreadable=allow_unreadable,
    )
    with preserve_rng_state():
        return Experiment.start(request).run(show_progress=show_progress)


def in_memory(data: Any) -> Any:
    """Return data that are objects in memory, and None for data that are found again by their name or path."""
    return None if isinstance(data, (str, Path)) else data
