"""One experiment from data to report: what ``convlens train`` runs."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convlens.data.augment import mirror
from convlens.data.catalog import load_dataset
from convlens.data.dataset import Dataset
from convlens.data.preprocess import Preprocess
from convlens.data.published import DATASETS
from convlens.errors import ConvlensError, UsageError
from convlens.evaluation.metrics import make_views
from convlens.models import count_parameters, create_model, initialise_from, model_options
from convlens.reporting import plots
from convlens.reporting.report import write_report
from convlens.run import Run
from convlens.runfolder import RunFolder, write_csv, write_json
from convlens.runtime import available_cores, choose_device, describe_machine, use_threads
from convlens.shipping.bundle import Bundle, find_bundle, load_bundle, shipped_models
from convlens.shipping.classifier import Classifier
from convlens.training.budget import candidates, fit_into
from convlens.training.checkpoint import CheckpointStore, EpochRecord
from convlens.training.engine import fit
from convlens.training.optim import make_augment
from convlens.training.precision import choose_precision
from convlens.training.recipe import LENGTHS, MODEL_OPTIONS, Recipe
from convlens.training.recipes import default_recipe, get_recipe

METRIC_COLUMNS = [field.name for field in dataclasses.fields(EpochRecord)]
TEST_COLUMNS = ("test_loss", "test_acc")  # only where the recipe watches the test split


@dataclass(eq=False)
class Experiment:
    """A training that is set up: iterate :meth:`epochs`, then call :meth:`finish`."""

    folder: RunFolder
    config: dict[str, Any]
    recipe: Recipe
    dataset: Dataset  # with its validation split
    preprocess: Preprocess
    net: nn.Module

    @classmethod
    def create(
        cls,
        data: Any,
        recipe: str | Recipe | None = None,
        *,
        out: str | Path | None = None,
        init: str | Path | None = None,
        allow_unreadable: bool = False,
        budget: float | None = None,
        started: float | None = None,
        **overrides: Any,
    ) -> Experiment:
        """Load the data, settle the recipe, build the net and make the run folder.

        ``recipe`` is a name, a Recipe, or None for the default of the data; ``overrides`` are recipe options.
        ``init`` names a run or model whose trained stages the net starts from, with a new head. ``budget`` is the
        seconds that everything may take, counted from ``started`` (time.perf_counter; by default now).
        """
        started = time.perf_counter() if started is None else started
        if budget is not None and any(overrides.get(name) is not None for name in LENGTHS):
            raise UsageError("--budget decides the length; give no --epochs, --iterations or --seconds beside it")
        if out is not None:
            RunFolder.refuse_existing(out)
        if isinstance(recipe, str):
            recipe = get_recipe(recipe)
        elif not isinstance(recipe, Recipe | None):
            raise UsageError(f"a recipe is a name or a Recipe, not a {type(recipe).__name__}; arrays go as one: (x, y)")
        start = load_bundle(find_bundle(init)) if init is not None else None

        def settle(recipe: Recipe) -> Recipe:
            if start is not None:
                recipe = recipe.override(**recipe_of_model(start))
            recipe = recipe.override(**overrides)
            # the recipe's width of its own net is no option of another net that --model asks for
            unfit = set(recipe.model_options()) - set(model_options(recipe.model)) - set(overrides)
            return recipe.override(**dict.fromkeys(unfit))

        settled = settle(recipe or default_recipe(data_name(data)))
        refuse_inside_data(out, data)
        device = choose_device(settled.device)
        threads = use_threads(settled.threads)
        # what was resolved is what is recorded: a resumed run computes as the first part did
        settled = settled.override(device=device.type, threads=threads)

        channels = start.preprocess.channels if start is not None else 0
        loaded = load_dataset(data, image_size=settled.image_size, channels=channels, allow_unreadable=allow_unreadable)
        if settled.image_size not in (0, loaded.shape[1]):
            raise UsageError(f"--image-size is for folders; {loaded.name} has images of {loaded.shape[1]} pixels")
        if budget is not None:
            running = {"device": device.type, "threads": threads}
            choices = [settle(choice).override(**running) for choice in candidates(data_name(data), recipe)]
            settled = fit_into(budget, started, loaded, choices)
        dataset = loaded.with_validation(settled.validation, settled.seed)
        preprocess = Preprocess.measure(dataset.train.images, dataset.style)
        torch.manual_seed(settled.seed)
        model = describe_model(settled, dataset)
        net = make_net(model, dataset, preprocess)
        settled = settled.override(precision=choose_precision(settled, device, net, dataset.shape))
        config = {
            "convlens": version("convlens"),
            "command": command_line(),
            "recipe": dataclasses.asdict(settled),
            "model": {**model, "parameters": count_parameters(net)},
            "data": describe_data(dataset, loaded.fingerprint()),
            "preprocess": preprocess.to_json(),
            "machine": describe_machine(device),
        }
        if init is not None and start is not None:
            origin = str(init) if str(init) in shipped_models() else str(Path(init).resolve())
            config["init"] = {"from": origin, "tensors": adopt_weights(net, start)}
        folder = RunFolder.create(out, dataset.name)
        write_split(folder, dataset)
        write_json(folder.config, config)  # last: with it, the folder is a run that can be resumed
        return cls(folder, config, settled, dataset, preprocess, net)

    @classmethod
    def resume(cls, path: str | Path, *, allow_unreadable: bool = False) -> Experiment:
        """Set up the unfinished training in a run folder to go on; UsageError if it is finished or data changed."""
        folder = RunFolder.open(path)
        config = folder.read_config()
        if folder.report.exists():
            raise UsageError(f"the training of {path} is finished; nothing to resume")
        try:
            recipe = Recipe.from_json(config["recipe"])
            data, model = config["data"], config["model"]
            preprocess = Preprocess.from_json(config["preprocess"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConvlensError(f"{folder.config} is damaged: {error!r}") from None
        if data["source"] is None:
            raise UsageError(f"the data of {path} were objects in memory; only data on disk can be resumed")
        use_threads(min(recipe.threads, available_cores()))
        loaded = load_dataset(
            data["source"],
            image_size=recipe.image_size,
            channels=preprocess.channels,
            allow_unreadable=allow_unreadable or bool(data["unreadable"]),
        )
        if loaded.fingerprint() != data["fingerprint"]:
            raise UsageError(f"the data in {data['source']} have changed since {path} was started; train anew")
        dataset = loaded.with_validation(recipe.validation, recipe.seed)
        torch.manual_seed(recipe.seed)  # the first weights again, should no checkpoint have been written yet
        net = make_net(model, dataset, preprocess)
        if "init" in config and not any(folder.checkpoint.glob("*.json")):
            adopt_weights(net, load_bundle(find_bundle(config["init"]["from"])))
        return cls(folder, config, recipe, dataset, preprocess, net)

    def epochs(
        self, *, should_stop: Callable[[], bool] = lambda: False, show_progress: bool = False
    ) -> Iterator[EpochRecord]:
        """Train; yield one record an epoch (those of an interrupted run first), keeping ``metrics.csv`` up to date."""
        records: list[EpochRecord] = []
        for record in fit(
            self.net,
            self.dataset,
            self.recipe,
            preprocess=self.preprocess,
            store=CheckpointStore(self.folder.checkpoint),
            should_stop=should_stop,
            show_progress=show_progress,
        ):
            records.append(record)
            write_metrics(self.folder, records, watched=self.recipe.watch_test)
            yield record

    def finish(self) -> Run:
        """Measure the test split, once; write bundle, ``test.json``, ``predictions.csv``, plots and report."""
        dataset, folder = self.dataset, self.folder
        records = folder.read_metrics()
        model = {key: self.config["model"][key] for key in ("name", "arguments")}
        bundle = Bundle(self.net, model, dataset.classes, self.preprocess, {})
        classifier = Classifier(bundle, self.recipe.device)
        views = make_views(self.recipe.flip) if self.recipe.test_views else None
        test, logits = classifier.test(dataset.test, views)
        seconds = records[-1]["seconds"] if records else 0.0
        trained = {
            "convlens": version("convlens"),
            "command": without_paths(self.config["command"], self.config["data"]),
            "recipe": self.config["recipe"],
            "data": without_path(self.config["data"]),
            "machine": self.config["machine"],
            "parameters": self.config["model"]["parameters"],
            "seconds": seconds,
            "test": {key: test[key] for key in ("n", "accuracy", "accuracy_interval", "loss")},
        }
        dataclasses.replace(bundle, trained=trained).save(folder.model)
        probabilities = logits.softmax(dim=1).cpu()
        write_predictions(folder, dataset, probabilities)
        write_json(folder.test, test)
        self._draw(records, test, probabilities)
        write_report(folder)  # last: its presence says that the training is finished
        return Run(folder.path)

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
            changed, _ = augment(seen, labels, torch.Generator().manual_seed(self.recipe.seed))
        pixels = denormalise(changed, self.preprocess)
        plots.draw_images(folder / "augmented.png", pixels, names, "The same images as the net saw them")
        plots.draw_curves(folder / "curves.png", records)
        plots.draw_confusion(folder / "confusion.png", test["confusion_matrix"], classes)
        plots.draw_mistakes(folder / "mistakes.png", dataset.test.images, dataset.test.labels, probabilities, classes)
        for conv in [module for module in self.net.modules() if isinstance(module, nn.Conv2d)][:1]:
            plots.draw_filters(folder / "filters.png", conv.weight.detach().cpu())


def train(
    data: Any,
    recipe: str | Recipe | None = None,
    *,
    out: str | Path | None = None,
    init: str | Path | None = None,
    allow_unreadable: bool = False,
    budget: float | None = None,
    show_progress: bool = False,
    **overrides: Any,
) -> Run:
    """Train a classifier on ``data`` and return the finished Run: folder, figures, net.

    ``data`` is whatever :func:`convlens.load_dataset` takes; ``recipe`` a name, a Recipe, or None for the default
    of the data; ``overrides`` are recipe options, such as ``epochs=3, seed=1``. The run lies in ``out``, or the
    next free ``runs/<data>-<n>``. ``budget`` is the seconds that all of it may take: net and length are chosen to fit.
    Raises UsageError and ConvlensError with one line that says what to do.
    """
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng():  # the caller's random numbers and threads stay as they are
            experiment = Experiment.create(
                data, recipe, out=out, init=init, allow_unreadable=allow_unreadable, budget=budget, **overrides
            )
            for _ in experiment.epochs(show_progress=show_progress):
                pass
            return experiment.finish()
    finally:
        torch.set_num_threads(threads)


def data_name(data: Any) -> str:
    """Return the name by which a default recipe is looked up."""
    return data.name if isinstance(data, Dataset) else str(data)


def command_line() -> str:
    """Return the command that runs, as a person would type it; ``python`` for calls from Python."""
    program = Path(sys.argv[0])
    if program.stem != "convlens" and program.parts[-2:] != ("convlens", "__main__.py"):
        return "convlens.train(...) in Python"
    return shlex.join(["convlens", *sys.argv[1:]])


def describe_model(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """Return the name and the constructor arguments of the recipe's net for these images."""
    channels, height, width = dataset.shape
    sizes = {"channels": channels, "height": height, "width": width, "classes": len(dataset.classes)}
    return {"name": recipe.model, "arguments": {**sizes, **recipe.model_options()}}


def make_net(model: dict[str, Any], dataset: Dataset, preprocess: Preprocess) -> nn.Module:
    """Build a fresh net, and let it take what it wants to from the training images."""
    net = create_model(model["name"], **model["arguments"])
    initialise_from(net, dataset.train.images, preprocess.normaliser())
    return net


def describe_data(dataset: Dataset, fingerprint: str) -> dict[str, Any]:
    """Return what a run records of its data."""
    return {
        "name": dataset.name,
        "source": dataset.source,
        "classes": list(dataset.classes),
        "shape": list(dataset.shape),
        "counts": {name: len(split) for name, split in dataset.splits.items()},
        "note": dataset.note,
        "unreadable": list(dataset.unreadable),
        "fingerprint": fingerprint,
    }


def without_path(data: dict[str, Any]) -> dict[str, Any]:
    """Return what a bundle, which travels, says of its data: not where they lie on this machine."""
    return {**data, "source": data["source"] if data["source"] in DATASETS else None, "unreadable": []}


def without_paths(command: str, data: dict[str, Any]) -> str:
    """Return the command for a bundle, which travels: the data by name, absolute paths by their last part."""
    words = []
    for word in shlex.split(command):
        path = Path(word)
        if data["source"] not in (None, data["name"]) and not word.startswith("-") and path.exists():
            word = data["name"] if path.resolve() == Path(data["source"]) else word
        words.append(Path(word).name if Path(word).is_absolute() else word)
    return shlex.join(words)


def refuse_inside_data(out: str | Path | None, data: Any) -> None:
    """Raise UsageError if the run folder would lie in the folder that is trained on: it is only ever read."""
    if not isinstance(data, (str, Path)) or str(data) in DATASETS or not Path(data).is_dir():
        return
    target = Path(out) if out is not None else Path("runs")
    if target.resolve().is_relative_to(Path(data).resolve()):
        raise UsageError(f"the run would be written into the data in {data}; choose a place outside with --out")


def recipe_of_model(bundle: Bundle) -> dict[str, Any]:
    """Return the recipe options that rebuild a bundle's net."""
    name, arguments = bundle.model["name"], bundle.model["arguments"]
    unset = dict.fromkeys(MODEL_OPTIONS)  # what the bundle does not name is its net's default, not the recipe's
    return {"model": name, **unset, **{key: arguments[key] for key in model_options(name) if key in arguments}}


def adopt_weights(net: nn.Module, bundle: Bundle) -> str:
    """Copy the trained stages of ``bundle`` into ``net``, leaving its head fresh; say how many tensors fitted."""
    own, trained = net.state_dict(), bundle.net.state_dict()
    fitting = {
        key: value
        for key, value in trained.items()
        if not key.startswith("head.") and key in own and own[key].shape == value.shape
    }
    if not any(value.dim() > 1 for value in fitting.values()):
        raise UsageError(f"--init: no weight of its {bundle.model['name']} fits a net {type(net).__name__} here")
    net.load_state_dict({**own, **fitting})
    return f"{len(fitting)} of {len(own)}"


def denormalise(x: Tensor, preprocess: Preprocess) -> Tensor:
    """Return normalised images (N, C, H, W) as uint8 pixels again."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (preprocess.mean, preprocess.std))
    return ((x * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def write_metrics(folder: RunFolder, records: list[EpochRecord], *, watched: bool) -> None:
    """Write ``metrics.csv``; the test columns only if the recipe watches the test split."""
    columns = [name for name in METRIC_COLUMNS if watched or name not in TEST_COLUMNS]
    rows = [[getattr(record, name) for name in columns] for record in records]
    write_csv(folder.metrics, columns, rows)


def write_predictions(folder: RunFolder, dataset: Dataset, probabilities: Tensor) -> None:
    """Write ``predictions.csv``: id, label, prediction and probability of every test image."""
    values, numbers = probabilities.max(dim=1)
    classes, test = dataset.classes, dataset.test
    columns = zip(test.ids, test.labels.tolist(), numbers.tolist(), values.tolist(), strict=True)
    rows = [[name, classes[label], classes[guess], f"{value:.6f}"] for name, label, guess, value in columns]
    write_csv(folder.predictions, ["id", "label", "prediction", "probability"], rows)


def write_split(folder: RunFolder, dataset: Dataset) -> None:
    """Record which image is in which split: ``split.csv``."""
    rows = [[name, image] for name, split in dataset.splits.items() for image in split.ids]
    write_csv(folder.split, ["split", "id"], rows)
