"""One experiment from data to report: what ``convlens train`` runs."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convlens.data.augment import Draws, mirror
from convlens.data.catalog import load_dataset, load_recorded
from convlens.data.dataset import Dataset
from convlens.data.preprocess import Preprocess
from convlens.data.published import DATASETS
from convlens.errors import ConvlensError, UsageError
from convlens.evaluation.metrics import make_views
from convlens.evaluation.trust import Trust
from convlens.explain.stages import first_convolution
from convlens.machine import available_cores
from convlens.models import count_parameters, model_options
from convlens.ranks import Ranks, job, join, started_again
from convlens.record import (
    Board,
    LiveRecord,
    command_line,
    describe_data,
    find_tensorboard,
    summarise_test,
    without_path,
    without_paths,
    write_metrics,
    write_predictions,
    write_split,
)
from convlens.reporting import plots
from convlens.reporting.report import write_report
from convlens.run import Run
from convlens.runfolder import RunFolder, read_json, read_names, write_json, write_names
from convlens.runtime import callers_state_kept, choose_device, describe_machine, use_threads
from convlens.shipping.bundle import Bundle
from convlens.shipping.classifier import Classifier
from convlens.training.budget import candidates, fit_into, parse_budget
from convlens.training.checkpoint import CheckpointStore, EpochRecord
from convlens.training.engine import Watcher, fit
from convlens.training.nets import describe_net, make_net
from convlens.training.optim import make_augment
from convlens.training.precision import choose_precision
from convlens.training.recipe import LENGTHS, Recipe
from convlens.training.recipes import default_recipe, get_recipe
from convlens.training.start import adopt_weights, image_form, start_from_model, start_from_weights


@dataclass(eq=False)
class Experiment:
    """A training that is set up: iterate :meth:`epochs`, then call :meth:`finish`."""

    folder: RunFolder
    config: dict[str, Any]
    recipe: Recipe
    dataset: Dataset  # with its validation split
    preprocess: Preprocess
    net: nn.Module
    ranks: Ranks = field(default_factory=join)

    @classmethod
    def create(
        cls,
        data: Any,
        recipe: str | Recipe | None = None,
        *,
        out: str | Path | None = None,
        init: str | Path | None = None,
        allow_unreadable: bool = False,
        budget: float | str | None = None,
        exclude: str | Path | None = None,
        started: float | None = None,
        **overrides: Any,
    ) -> Experiment:
        """Load the data, settle the recipe, build the net and make the run folder.

        ``recipe`` is a name, a Recipe, or None for the default of the data; ``overrides`` are recipe options.
        ``init`` names a run or model whose trained stages the net starts from, with a new head. ``budget`` is the
        time that everything may take (seconds, or "5m"), counted from ``started`` (time.perf_counter; by default now).
        ``exclude`` is a file that names images to leave out, as the data doctor writes it.

        Of several processes that torchrun has started, the first does all that, and the others follow it; if it takes
        the place of one that has died, it goes on with the run that the job has begun.
        """
        ranks = join()
        if not ranks.first:
            return cls._follow(data, ranks)
        if begun := find_begun(out):
            return cls.resume(begun, finished_too=True)
        started = time.perf_counter() if started is None else started
        allowed = None if budget is None else parse_budget(str(budget))  # seconds
        if budget is not None and any(overrides.get(name) is not None for name in LENGTHS):
            raise UsageError("--budget decides the length; give no --epochs, --iterations or --seconds beside it")
        if out is not None:
            RunFolder.refuse_existing(out)
        if isinstance(recipe, str):
            recipe = get_recipe(recipe)
        elif not isinstance(recipe, Recipe | None):
            raise UsageError(f"a recipe is a name or a Recipe, not a {type(recipe).__name__}; arrays go as one: (x, y)")
        start = start_from_model(init) if init is not None else None

        def settle(recipe: Recipe) -> Recipe:
            if start is not None and start.options is not None:
                recipe = recipe.override(**start.options)
            recipe = recipe.override(**overrides)
            # the recipe's width of its own net is no option of another net that --model asks for
            unfit = set(recipe.model_options()) - set(model_options(recipe.model)) - set(overrides)
            return recipe.override(**dict.fromkeys(unfit))

        settled = settle(recipe or default_recipe(data_name(data)))
        if start is not None and settled.pretrained:
            raise UsageError("--init or --pretrained, not both: each says what weights to start from")
        start = start or start_from_weights(settled)
        if settled.frozen and start is None:
            raise UsageError("--frozen leaves trained stages as they are; name them with --pretrained or --init")
        if settled.tensorboard:
            find_tensorboard()
        refuse_inside_data(out, data)
        device = choose_device(settled.device)
        threads = use_threads(settled.threads)
        # what was resolved is what is recorded: a resumed run computes as the first part did
        settled = settled.override(device=device.type, threads=threads)

        form = image_form(settled, start)
        loaded = load_dataset(data, **form, allow_unreadable=allow_unreadable)
        if exclude is not None:
            loaded = loaded.without(read_names(exclude))
        if settled.image_size not in (0, loaded.shape[1]):
            raise UsageError(f"--image-size is for folders; {loaded.name} has images of {loaded.shape[1]} pixels")
        if loaded.shape[1] == form["image_size"]:
            settled = settled.override(image_size=form["image_size"])
        if allowed is not None:
            running = {"device": device.type, "threads": threads, "image_size": settled.image_size}
            choices = [settle(choice).override(**running) for choice in candidates(data_name(data), recipe)]
            settled = fit_into(allowed, started, loaded, choices)
        dataset = loaded.with_validation(settled.validation, settled.seed)
        preprocess = Preprocess.measure(dataset.train.images, dataset.style)
        if start is not None:
            if settled.pretrained:
                settled = settled.override(pretrained=start.origin)  # which holds in another folder too
            preprocess = start.normalise(preprocess)
        torch.manual_seed(settled.seed)
        model = describe_net(settled, dataset)
        net = make_net(model, dataset, preprocess)
        for part in ("features", "head"):  # what a test asks of a net that training does not
            if not hasattr(net, part):
                raise UsageError(f"model {settled.model!r} has no {part!r}; convlens.models.check_model says more")
        settled = settled.override(precision=choose_precision(settled, device, net, dataset.shape))
        config = {
            "convlens": version("convlens"),
            "command": command_line(),
            "recipe": dataclasses.asdict(settled),
            "model": {**model, "parameters": count_parameters(net)},
            "data": describe_data(dataset, loaded.fingerprint()),
            "preprocess": preprocess.to_json(),
            "machine": describe_machine(device),
            **({"job": job()} if job() else {}),
        }
        if start is not None:
            config["init"] = {"from": start.origin, "tensors": adopt_weights(net, start, settled.frozen)}
        folder = RunFolder.create(out, dataset.name)
        try:
            write_split(folder, dataset)
            if loaded.left_out:
                write_names(folder.excluded, dict.fromkeys(loaded.left_out, ""))
            write_json(folder.config, config)  # last: with it, the folder is a run that can be resumed
        except BaseException:  # Ctrl-C too
            shutil.rmtree(folder.path, ignore_errors=True)
            raise
        return cls(folder, config, settled, dataset, preprocess, net)._lead()

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
        ranks = join()
        if not ranks.first:
            return cls._follow(data, ranks)
        folder = RunFolder.open(path)
        config = folder.read_config()
        if folder.report.exists() and not finished_too:
            raise UsageError(f"the training of {path} is finished; nothing to resume")
        read_plan(folder, config)  # is it whole?
        changes = list_changes(folder, config, accept=accept_changes)
        left_out = read_names(folder.excluded) if folder.excluded.exists() else []
        again = cls._rebuild(folder, config, data, left_out, allow_unreadable=allow_unreadable)
        if not folder.split.exists():
            write_split(folder, again.dataset)
        if new := [change for change in changes if change not in config.get("resumed", [])]:
            config["resumed"] = [*config.get("resumed", []), *new]
            with folder.claimed():
                write_json(folder.config, config)
        if "init" in config and not any(folder.checkpoint.glob("*.json")):
            adopt_weights(again.net, start_from_weights(again.recipe) or start_from_model(config["init"]["from"]))
        return again._lead()

    @classmethod
    def _rebuild(
        cls, folder: RunFolder, config: dict[str, Any], data: Any, left_out: list[str], *, allow_unreadable: bool
    ) -> Experiment:
        """Load the data and build the net that a run's config.json tells of; UsageError if the data have changed."""
        recipe, preprocess = read_plan(folder, config)
        recorded, model = config["data"], config["model"]
        if data is None and recorded["source"] is None:
            raise UsageError(f"the data of {folder.path} were objects in memory; only data on disk can be resumed")
        loaded = load_recorded(
            recorded,
            data,
            without=left_out,
            image_size=recipe.image_size,
            channels=preprocess.channels,
            allow_unreadable=allow_unreadable or bool(recorded["unreadable"]),
        )
        if loaded.fingerprint() != recorded["fingerprint"]:
            raise UsageError(
                f"the data in {recorded['source'] or loaded.name} have changed since {folder.path} was started; "
                "train anew"
            )
        dataset = loaded.with_validation(recipe.validation, recipe.seed)
        torch.manual_seed(recipe.seed)  # the first weights again, should no checkpoint have been written yet
        return cls(folder, config, recipe, dataset, preprocess, make_net(model, dataset, preprocess))

    def _lead(self) -> Experiment:
        """Tell the other processes what to train."""
        self.ranks.share([str(self.folder.path), self.config, list(self.dataset.left_out)])
        return self

    @classmethod
    def _follow(cls, data: Any, ranks: Ranks) -> Experiment:
        """Set up what the first process has decided."""
        path, config, left_out = ranks.share(None)
        use_threads(min(config["recipe"]["threads"], available_cores()))
        source = None if config["data"]["source"] else data
        return cls._rebuild(RunFolder(path), config, source, left_out, allow_unreadable=True)

    def epochs(
        self, *, should_stop: Callable[[], bool] = lambda: False, show_progress: bool = False
    ) -> Iterator[EpochRecord]:
        """Train; yield one record an epoch (those of an interrupted run first), keeping ``metrics.csv`` up to date."""
        records: list[EpochRecord] = []
        watcher = Watcher()
        if self.ranks.first:
            watcher = LiveRecord(self.folder, self.dataset, self.preprocess.normaliser(), self.recipe)
        board = Board(self.folder.tensorboard, wanted=self.recipe.tensorboard and self.ranks.first)
        claim = self.folder.claimed() if self.ranks.first else contextlib.nullcontext()
        with claim, contextlib.closing(board):
            for record in fit(
                self.net,
                self.dataset,
                self.recipe,
                preprocess=self.preprocess,
                store=CheckpointStore(self.folder.checkpoint),
                should_stop=should_stop,
                watcher=watcher,
                show_progress=show_progress and self.ranks.first,
            ):
                records.append(record)
                if self.ranks.first:
                    write_metrics(self.folder, records, watched=self.recipe.watch_test)
                board.add(record)
                yield record

    def finish(self) -> Run:
        """Measure the test split, once; write bundle, ``test.json``, ``predictions.csv``, plots and report."""
        if self.ranks.first:
            with self.folder.claimed():
                if not self.folder.report.exists():  # else another process has finished it
                    self._finish()
        self.ranks.share(None)  # the others wait for it
        return Run(self.folder.path)

    def _finish(self) -> None:
        """Do what :meth:`finish` says."""
        dataset, folder = self.dataset, self.folder
        records = folder.read_metrics()
        model = {key: self.config["model"][key] for key in ("name", "arguments")}
        trust = None
        if dataset.validation is not None:
            normalise = self.preprocess.normaliser()
            trust = Trust.fit(self.net, dataset.train, dataset.validation, len(dataset.classes), normalise)
        bundle = Bundle(self.net, model, dataset.classes, self.preprocess, {}, trust)
        classifier = Classifier(bundle, self.recipe.device)
        views = make_views(self.recipe.flip) if self.recipe.test_views else None
        test, logits = classifier.test(dataset.test, views)
        seconds = records[-1]["seconds"] if records else 0.0
        trained = {
            "convlens": version("convlens"),
            "command": without_paths(self.config["command"], self.config["data"]),
            "recipe": {**self.config["recipe"], "pretrained": Path(self.recipe.pretrained).name},
            "data": without_path(self.config["data"]),
            "machine": self.config["machine"],
            "parameters": self.config["model"]["parameters"],
            "seconds": seconds,
            "test": summarise_test(test),
        }
        dataclasses.replace(bundle, trained=trained).save(folder.model)
        probabilities = classifier.probabilities(logits)
        write_predictions(folder, dataset, probabilities)
        write_json(folder.test, test)
        self._draw(records, test, probabilities)
        write_report(folder)  # last: its presence says that the training is finished

    def _draw(self, records: list[dict[str, float | None]], test: dict[str, Any], probabilities: Tensor) -> None:
        """Draw every plot of the run."""
        dataset, folder, classes = self.dataset, self.folder.plots, self.dataset.classes
        train = dataset.train
        rows = plots.pick_samples(train.labels, len(classes))
        images, labels = train.images[rows], train.labels[rows]
        names = [classes[label] for label in labels.tolist()]
        plots.draw_images(folder / "samples.png", images, names, "What it learns from: training images")
        augment = make_augment(self.recipe, len(classes))
        normalise = self.preprocess.normaliser()
        with torch.no_grad():
            turned = torch.arange(len(rows)) % 2 == 1  # every second one, as in each epoch
            seen = mirror(normalise(images), turned) if self.recipe.flip else normalise(images)
            draws = Draws(torch.Generator().manual_seed(self.recipe.seed), len(rows), slice(None))
            changed, _ = augment(seen, labels, draws)
        pixels = normalise.invert(changed)
        plots.draw_images(folder / "augmented.png", pixels, names, "The same images as the net saw them")
        plots.draw_curves(folder / "curves.png", records)
        plots.draw_confusion(folder / "confusion.png", test["confusion_matrix"], classes)
        if calibration := test.get("calibration"):
            plots.draw_reliability(folder / "calibration.png", calibration)
        plots.draw_mistakes(folder / "mistakes.png", dataset.test.images, dataset.test.labels, probabilities, classes)
        if conv := first_convolution(self.net):
            plots.draw_filters(folder / "filters.png", conv.weight.detach().cpu().numpy())


def train(
    data: Any,
    recipe: str | Recipe | None = None,
    *,
    out: str | Path | None = None,
    init: str | Path | None = None,
    allow_unreadable: bool = False,
    budget: float | str | None = None,
    exclude: str | Path | None = None,
    show_progress: bool = False,
    **overrides: Any,
) -> Run:
    """Train a classifier on ``data`` and return the finished Run: folder, figures, net.

    ``data`` is whatever :func:`convlens.load_dataset` takes; ``recipe`` a name, a Recipe, or None for the default of
    the data; ``overrides`` are recipe options, such as ``epochs=3, seed=1``. The run lies in ``out``, a new folder, or
    the next free ``runs/<data>-<n>``. ``init`` names a run or model whose trained stages the net starts from, with a
    new head. ``budget`` is the time that all of it may take (seconds, or "5m"): net and length are chosen to fit.
    ``exclude`` is a file that names images to leave out, one a line, as the data doctor writes it. ``allow_unreadable``
    trains although more than 1% of a folder's files cannot be read. PyTorch's random numbers and threads are left as
    they were. Raises UsageError for what was asked wrongly, ConvlensError for data that cannot be read or a disk that
    is full, Diverged when the loss is no number any more: one line each, that says what to do.
    """
    with callers_state_kept():
        experiment = Experiment.create(
            data,
            recipe,
            out=out,
            init=init,
            allow_unreadable=allow_unreadable,
            budget=budget,
            exclude=exclude,
            **overrides,
        )
        for _ in experiment.epochs(show_progress=show_progress):
            pass
        return experiment.finish()


def data_name(data: Any) -> str:
    """Return the name by which a default recipe is looked up."""
    return data.name if isinstance(data, Dataset) else str(data)


def refuse_inside_data(out: str | Path | None, data: Any, flag: str = "--out") -> None:
    """Raise UsageError if ``out`` (None: ``runs``) would lie in the folder of the data: it is only ever read."""
    data = data.source if isinstance(data, Dataset) else data
    if not isinstance(data, (str, Path)) or str(data) in DATASETS or not Path(data).is_dir():
        return
    target = Path(out) if out is not None else Path("runs")
    if target.resolve().is_relative_to(Path(data).resolve()):
        raise UsageError(f"{target} would be written into the data in {data}; choose a place outside with {flag}")


def find_begun(out: str | Path | None) -> Path | None:
    """Return the run that this job of torchrun has begun, in ``out`` or in ``runs``, if it has been started again."""
    if not started_again():
        return None
    for config in [Path(out) / "config.json"] if out is not None else Path("runs").glob("*/config.json"):
        with contextlib.suppress(ConvlensError):
            if read_json(config).get("job") == job():
                return config.parent
    return None


def read_plan(folder: RunFolder, config: Mapping[str, Any]) -> tuple[Recipe, Preprocess]:
    """Return the recipe and the preprocessing of a run's config.json; ConvlensError if it is damaged."""
    try:
        config["data"]["source"], config["model"]["name"]
        return Recipe.from_json(config["recipe"]), Preprocess.from_json(config["preprocess"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConvlensError(f"{folder.config} is damaged: {error!r}") from None


def list_changes(folder: RunFolder, config: Mapping[str, Any], *, accept: bool) -> list[str]:
    """Return what is not as it was when the run of ``config`` was started, of what decides the last digits.

    It computes with that run's threads from here on, if there are as many. Raises UsageError that names the changes
    unless they are accepted; another number of processes, which sum up in another order, is no hindrance.
    """
    names = {"device_name": "processor", "threads": "number of threads", "torch": "version of PyTorch"}
    use_threads(min(config["recipe"]["threads"], available_cores()))
    was, now = config.get("machine", {}), describe_machine(choose_device(config["recipe"]["device"]))
    changes = [f"{name} ({was.get(key)}, now {now[key]})" for key, name in names.items() if was.get(key) != now[key]]
    if config.get("convlens") != (own := version("convlens")):
        changes.append(f"version of convlens ({config.get('convlens')}, now {own})")
    if changes and not accept:
        raise UsageError(
            f"{folder.path} was started with another {', another '.join(changes)}: what comes of it would not be what "
            "one uninterrupted training gives; go on all the same with --accept-changes"
        )
    if was.get("processes", 1) != now["processes"]:
        changes.append(f"number of processes ({was.get('processes', 1)}, now {now['processes']})")
    return changes
