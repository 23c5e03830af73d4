"""A finished run: its figures, its net, its test once more, and two runs beside each other."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convlens.data.dataset import Dataset
from convlens.data.download import only_from_here
from convlens.data.loading import as_recorded, load_dataset
from convlens.errors import ConvlensError, UnknownName, UsageError
from convlens.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from convlens.evaluation.inference import make_views
from convlens.evaluation.metrics import Scores, dense_confusion
from convlens.evaluation.significance import Paired
from convlens.explain.explanation import Explanation, TrainingImages, explain
from convlens.inference.bundle import Bundle, load_bundle
from convlens.inference.classifier import Classifier
from convlens.inference.predictor import Picture, Prediction
from convlens.inference.store import find_bundle
from convlens.run_dir import RunFolder
from convlens.system.device import use_threads
from convlens.system.files import read_json, read_names
from convlens.system.progress import track
from convlens.system.text import first_few, quoted


class Run:
    """A finished training: its folder, its figures and its net. What is read is read when it is first asked for.

    ``path`` is the folder, also as the attribute ``path``. Raises UsageError if it is no run's folder; what a run that
    is not finished has not got yet raises ConvlensError, with the name of the file.
    """

    def __init__(self, path: str | Path):
        self.folder = RunFolder.open(path)
        self.path = self.folder.path

    @cached_property
    def config(self) -> dict[str, Any]:
        """What was trained, and on what: ``config.json``.

        ``recipe``, ``model``, ``data``, ``preprocess``, ``machine``, ``command`` and ``convlens`` (its version).
        """
        return self.folder.read_config()

    @cached_property
    def test(self) -> dict[str, Any]:
        """Every figure of the final test: ``test.json``.

        Shares such as ``accuracy`` and ``balanced_accuracy`` are 0..1, ``accuracy_interval`` is Wilson's, 95%, ``loss``
        the mean cross-entropy in nats; ``classes`` has precision, recall, F1 and count of each. With validation images
        there are ``calibration``, ``coverage`` and ``known`` as well.
        """
        return read_json(self.folder.test)

    @property
    def confusion_matrix(self) -> NDArray[np.int64]:
        """Counts of test images, int64 (K, K): rows are true classes, columns predictions.

        ``confusion_matrix.csv`` has only the cells that are not 0: ``true_label``, ``predicted_label`` and ``count``.
        The whole takes 8 bytes x classes x classes.
        """
        with open(self.folder.confusion, newline="", encoding="utf-8", errors="surrogateescape") as file:
            return dense_confusion(list(csv.reader(file))[1:], self.config["data"]["classes"])

    @cached_property
    def metrics(self) -> list[dict[str, float | None]]:
        """One dict an epoch, with the fields of an :class:`EpochRecord`: ``metrics.csv``."""
        return self.folder.read_metrics()

    @cached_property
    def predictions(self) -> list[dict[str, str]]:
        """One dict a test image: ``predictions.csv``, with id, label, prediction and probability, all as text."""
        with open(self.folder.predictions, newline="", encoding="utf-8", errors="surrogateescape") as file:
            return list(csv.DictReader(file))

    @cached_property
    def classifier(self) -> Classifier:
        """The trained net, ready to use, on the CPU."""
        return Classifier.load(self.path)

    @property
    def accuracy(self) -> float:
        """Accuracy on the test split, 0..1."""
        return float(self.test["accuracy"])

    @property
    def report(self) -> Path:
        """Where the HTML report is."""
        return self.folder.report

    def picture(self, name: str) -> Image.Image:
        """Return one of the run's plots by its file's name ("curves", "confusion", ...), for a notebook to show.

        Raises UnknownName for one that this run has not.
        """
        plots = {file.stem: file for file in self.folder.plots.glob("*.png")}
        if name not in plots:
            raise UnknownName("plot", name, plots)
        with Image.open(plots[name]) as image:
            return image.copy()

    def predict(self, picture: Picture, **options: Any) -> Prediction:
        """Classify one picture; takes and raises what :meth:`convlens.Classifier.predict` does."""
        return self.classifier.predict(picture, **options)

    @cached_property
    def training_images(self) -> TrainingImages | None:
        """The images that it was trained on, as the net sees them; None if they have changed or are not there."""
        with contextlib.suppress(ConvlensError):
            return load_training_images(self.path, self.classifier)
        return None

    def explain(
        self,
        picture: Picture,
        *,
        raw: bool = False,
        label: str | None = None,
        unit: tuple[str, int, int, int] | None = None,
    ) -> Explanation:
        """Return all that can be seen of what the net says of a picture, as arrays.

        ``label`` is the class (its name) that the heat maps are about, by default the predicted one; ``unit`` (stage,
        channel, row, column) a unit whose receptive field is shown, instead of the stage's loudest. Training images
        that look like the picture are among it if they are still there. ``raw`` only resizes the picture. Raises
        BadImage for what cannot be read, UnknownName for a class or stage that there is not, UsageError for a unit that
        the stage has not, and ConvlensError for a net without a convolution.
        """
        pixels = self.classifier.adapt(picture, raw=raw)
        return explain(self.classifier, pixels, label=label, unit=unit, training=self.training_images)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"


def load_tested(source: str | Path, data: Any = None, *, other: bool = False) -> tuple[Bundle, Dataset]:
    """Return a run's or model's bundle, and the data set that it was trained and tested on.

    ``data`` says where that is now, if not where the run says; or it is ``other`` data, which are brought to the same
    form. Raises UsageError if the run's own data have changed, or other data have other classes or another size.
    """
    folder = find_bundle(source)
    bundle, run = load_bundle(folder), RunFolder(folder.parent)
    preprocess = bundle.preprocess
    recorded = read_json(run.config)["data"] if run.test.is_file() else bundle.trained["data"]
    own = data is None or not other
    if data is None and recorded["source"] is None:
        raise UsageError(f"{source} does not say where its data are; name them with --data")
    if own and recorded.get("left_out") and not run.excluded.exists():
        raise UsageError(f"{source} left images out, and the list of them is in its run folder; name that folder")
    form: dict[str, Any] = {"image_size": preprocess.height, "channels": preprocess.channels, "allow_unreadable": True}
    try:
        dataset = load_dataset(recorded["source"] if data is None else data, **form)
    except ConvlensError as error:
        if data is None:
            ConvlensError.__init__(error, f"{error}; if the data of {source} are elsewhere now, --data says where")
        raise
    named = recorded["source"] if data is None else data if isinstance(data, (str, Path)) else dataset.name
    unlike = (
        f"the data in {named} are not those that {source} was trained on, {recorded['name']}, or were packed or "
        "decoded in another way"
    )
    if own:
        try:
            dataset = as_recorded(dataset, recorded, read_names(run.excluded) if run.excluded.exists() else ())
        except UsageError:
            if data is None:
                raise
            raise UsageError(unlike) from None
    elif recorded.get("fold") and dataset.source == recorded["source"]:
        raise UsageError(f"{source} was trained on the test images of {data}: it is one fold; leave out --data")
    if dataset.classes != bundle.classes:
        raise UsageError(f"{named} has other classes than {source}: {tell_apart(dataset.classes, bundle.classes)}")
    expected = (preprocess.channels, preprocess.height, preprocess.width)
    if dataset.shape != expected:
        raise UsageError(f"{named} has images of (C, H, W) {dataset.shape}, {source} takes {expected}")
    if own and dataset.fingerprint() != recorded["fingerprint"]:
        if data is not None:
            raise UsageError(unlike)
        raise UsageError(
            f"the data in {named} have changed since the training, so that test images may have been trained on; put "
            f"them back, or {'name other data' if other else 'say where they are now'} with --data"
        )
    return bundle, dataset


def tell_apart(classes: Sequence[str], others: Sequence[str]) -> str:
    """Return what ``classes`` have and lack beside ``others``, in words: some of each."""
    mine, theirs = set(classes), set(others)
    more, fewer = [c for c in classes if c not in theirs], [c for c in others if c not in mine]
    told = [f"it {what} {first_few(names, 10)}" for what, names in (("lacks", fewer), ("alone has", more)) if names]
    return ", and ".join(told) or "the same in another order"


def load_training_images(source: str | Path, classifier: Classifier, data: Any = None) -> TrainingImages:
    """Return the images that a run's or model's net was trained on, without those held out; nothing is downloaded.

    Raises ConvlensError if they are not on this machine, UsageError if they have changed.
    """
    with contextlib.nullcontext() if data is not None else only_from_here():
        bundle, dataset = load_tested(source, data)
    recipe = bundle.trained["recipe"]
    return TrainingImages(classifier, dataset.with_validation(recipe["validation"], recipe["seed"]))


def evaluate_run(source: str | Path, data: Any = None, *, test_views: bool = False) -> dict[str, Any]:
    """Test a run's (or model's) net again, on its own test split or on that of ``data``; nothing is written.

    Returns the values that ``test.json`` has, and as ``confusion_matrix`` the rows of ``confusion_matrix.csv``; with
    ``test_views``, the metrics of test-time augmentation as well.
    """
    use_threads()
    bundle, dataset = load_tested(source, data, other=True)
    views = make_views(bundle.trained["recipe"].get("flip", False)) if test_views else None
    test, _ = Classifier(bundle).test(dataset.test, views)
    return test


def corrupt_run(source: str | Path, data: Any = None) -> tuple[float, dict[str, list[float]]]:
    """Return the accuracy on the test split as it is, and for each corruption at severities 1 to 5."""
    use_threads()
    bundle, dataset = load_tested(source, data, other=True)
    classifier = Classifier(bundle)
    clean = Scores.of(classifier.logits(dataset.test.images), dataset.test.labels).accuracy
    figures: dict[str, list[float]] = {}
    work = [(kind, severity) for kind in CORRUPTIONS for severity in SEVERITIES]
    for kind, severity in track(work, "testing corrupted images", len(work)):
        images = corrupt(dataset.test.images, kind, severity)
        accuracy = Scores.of(classifier.logits(images), dataset.test.labels).accuracy
        figures.setdefault(kind, []).append(accuracy)
    return clean, figures


def compare_runs(paths: list[str]) -> list[tuple[str, str, Paired]]:
    """Return (first, other, Paired) for each run beside the first, from their ``predictions.csv``.

    Raises UsageError unless all were tested on the same images.
    """
    if len(paths) < 2:
        raise UsageError("name two runs or more to compare")
    answers = [read_answers(Run(path)) for path in paths]
    pixels = [Run(path).config["data"].get("test_fingerprint") for path in paths]
    results = []
    for path, other, tested in zip(paths[1:], answers[1:], pixels[1:], strict=True):
        if other.keys() != answers[0].keys() or tested != pixels[0]:
            raise UsageError(f"{paths[0]} and {path} were tested on other images: they cannot be compared")
        right = [(answers[0][image], other[image]) for image in other]
        only_a, only_b = (sum(a and not b for a, b in right), sum(b and not a for a, b in right))
        results.append((paths[0], path, Paired(len(right), only_a, only_b)))
    return results


def read_answers(run: Run) -> dict[tuple[str, str], bool]:
    """Return which test images a run has right: (id, label) -> right?"""
    if not run.folder.predictions.is_file():
        raise ConvlensError(f"{run.path} is not finished: go on with: convlens train --resume {quoted(run.path)}")
    return {(row["id"], row["label"]): row["label"] == row["prediction"] for row in run.predictions}
