"""A finished run: its figures, its net, and its test once more."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from convlens.data.catalog import load_dataset
from convlens.errors import UsageError
from convlens.evaluation.metrics import make_views
from convlens.runfolder import RunFolder, read_json
from convlens.runtime import use_threads
from convlens.shipping.bundle import find_bundle, load_bundle
from convlens.shipping.classifier import Classifier, Picture, Prediction


class Run:
    """A finished training: its folder, its figures and its net."""

    def __init__(self, path: str | Path):
        self.folder = RunFolder.open(path)
        self.path = self.folder.path

    @cached_property
    def config(self) -> dict[str, Any]:
        """Recipe, data, machine and command line: ``config.json``."""
        return self.folder.read_config()

    @cached_property
    def test(self) -> dict[str, Any]:
        """Every figure of the final test: ``test.json``."""
        return read_json(self.folder.test)

    @cached_property
    def metrics(self) -> list[dict[str, float | None]]:
        """One dict an epoch: ``metrics.csv``."""
        return self.folder.read_metrics()

    @cached_property
    def classifier(self) -> Classifier:
        """The trained net, ready to use."""
        return Classifier.load(self.path)

    @property
    def accuracy(self) -> float:
        """Accuracy on the test split, 0..1."""
        return float(self.test["accuracy"])

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.folder.report

    def predict(self, picture: Picture, **options: Any) -> Prediction:
        """Classify one picture; see :meth:`convlens.Classifier.predict`."""
        return self.classifier.predict(picture, **options)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"


def evaluate_run(source: str | Path, data: Any = None, *, test_views: bool = False) -> dict[str, Any]:
    """Test a run's (or model's) net again, on its own test split or on that of ``data``; nothing is written.

    Returns the values that ``test.json`` has; with ``test_views``, those of test-time augmentation beside them.
    """
    folder = find_bundle(source)
    classifier = Classifier(load_bundle(folder))
    preprocess = classifier.preprocess
    run = RunFolder(folder.parent)
    recorded = read_json(run.config)["data"] if run.test.is_file() else classifier.bundle.trained["data"]
    own = data is None
    if own:
        data = recorded["source"]
        if data is None:
            raise UsageError(f"{source} does not say where its data are; name them with --data")
    use_threads()
    dataset = load_dataset(data, image_size=preprocess.height, channels=preprocess.channels, allow_unreadable=True)
    named = data if isinstance(data, (str, Path)) else dataset.name
    if dataset.classes != classifier.classes:
        raise UsageError(f"{named} has other classes than {source}: {', '.join(dataset.classes)}")
    if dataset.shape != (preprocess.channels, preprocess.height, preprocess.width):
        expected = (preprocess.channels, preprocess.height, preprocess.width)
        raise UsageError(f"{named} has images of (C, H, W) {dataset.shape}, {source} takes {expected}")
    if own and dataset.fingerprint() != recorded["fingerprint"]:
        raise UsageError(
            f"the data in {named} have changed since the training, so that test images may have been trained on; "
            "put them back, or name other data with --data"
        )
    views = make_views(classifier.bundle.trained["recipe"].get("flip", False)) if test_views else None
    test, _ = classifier.test(dataset.test, views)
    return test
