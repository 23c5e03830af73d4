"""Evaluate a finished run again: on its own test split, on other data, or on corrupted images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convlens.data.dataset import Dataset
from convlens.data.loading import as_recorded, load_dataset
from convlens.errors import ConvlensError, UsageError
from convlens.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from convlens.evaluation.inference import make_tta
from convlens.evaluation.metrics import Scores
from convlens.inference.bundle import Bundle, load_bundle
from convlens.inference.classifier import Classifier
from convlens.inference.store import resolve_bundle
from convlens.run_dir import RunDir
from convlens.system.device import set_num_threads
from convlens.system.files import read_json, read_name_list
from convlens.system.progress import track
from convlens.system.text import first_few


def load_evaluation_data(source: str | Path, data: Any = None, *, test_on: Any = None) -> tuple[Bundle, Dataset]:
    """Load a bundle, and the data set that it was trained and tested on, or another one to test on.

    Args:
        source: A run folder, a model folder, or a model by name.
        data: Location of the run's own data, if they have moved.
        test_on: Other data with the same classes; folders are resized to the model's image size.

    Raises:
        UsageError: The run's own data have changed, or the other data have other classes or another image size.
    """
    folder = resolve_bundle(source)
    bundle, run_dir = load_bundle(folder), RunDir(folder.parent)
    recorded = read_json(run_dir.config)["data"] if run_dir.test.is_file() else bundle.training["data"]
    if test_on is not None:
        dataset, name = load_for_bundle(bundle, test_on)
        if recorded.get("fold") and dataset.source == recorded["source"]:
            raise UsageError(f"{source} is one fold: it was trained on test images of {name}; leave out `test_on`")
        require_same_form(source, name, bundle, dataset)
        return bundle, dataset
    if data is None and recorded["source"] is None:
        raise UsageError(f"{source} does not record the location of its data; name it with `data`")
    if recorded.get("num_excluded") and not run_dir.excluded.exists():
        raise UsageError(f"{source} excludes images that are listed in its run folder; name that folder")
    try:
        dataset, name = load_for_bundle(bundle, recorded["source"] if data is None else data)
    except ConvlensError as error:
        if data is None:
            ConvlensError.__init__(error, f"{error}; if the data of {source} have moved, say where with `data`")
        raise
    return bundle, require_own_data(source, run_dir, recorded, bundle, dataset, name if data is not None else None)


def load_for_bundle(bundle: Bundle, data: Any) -> tuple[Dataset, str]:
    """Load data in the image size and channels of a bundle; return them and their name for messages."""
    preprocess = bundle.preprocess
    dataset = load_dataset(data, image_size=preprocess.height, channels=preprocess.channels, allow_unreadable=True)
    return dataset, str(data) if isinstance(data, (str, Path)) else dataset.name


def require_own_data(
    source: str | Path,
    run_dir: RunDir,
    recorded: Mapping[str, Any],
    bundle: Bundle,
    dataset: Dataset,
    moved_to: str | None,
) -> Dataset:
    """Return ``dataset`` without excluded images, as the run's fold; UsageError if it is not the run's own data."""
    name = recorded["source"] if moved_to is None else moved_to
    other = (
        f"the data in {name} are not those that {source} was trained on ({recorded['name']}), or were packed or "
        "decoded differently"
    )
    try:
        dataset = as_recorded(dataset, recorded, read_name_list(run_dir.excluded) if run_dir.excluded.exists() else ())
    except UsageError:
        if moved_to is None:
            raise
        raise UsageError(other) from None
    require_same_form(source, name, bundle, dataset)
    if dataset.fingerprint() != recorded["fingerprint"]:
        if moved_to is not None:
            raise UsageError(other)
        raise UsageError(
            f"the data in {name} have changed since the training, so test images may have been trained on; restore "
            "them, say where they are now with `data`, or evaluate on other data with `test_on`"
        )
    return dataset


def require_same_form(source: str | Path, name: str, bundle: Bundle, dataset: Dataset) -> None:
    """Raise UsageError if the classes or the image size of ``dataset`` are not those of the bundle."""
    if dataset.classes != bundle.classes:
        difference = describe_class_diff(dataset.classes, bundle.classes)
        raise UsageError(f"{name} has other classes than {source}: {difference}")
    expected = (bundle.preprocess.channels, bundle.preprocess.height, bundle.preprocess.width)
    if dataset.shape != expected:
        raise UsageError(f"{name} has images of (C, H, W) {dataset.shape}, {source} takes {expected}")


def describe_class_diff(classes: Sequence[str], others: Sequence[str]) -> str:
    """Describe which ``classes`` are missing in or added to ``others``; at most ten of each."""
    mine, theirs = set(classes), set(others)
    more, fewer = [c for c in classes if c not in theirs], [c for c in others if c not in mine]
    parts = [f"it {verb} {first_few(names, 10)}" for verb, names in (("lacks", fewer), ("adds", more)) if names]
    return " and ".join(parts) or "the same in another order"


def evaluate_run(source: str | Path, data: Any = None, *, test_on: Any = None, tta: bool = False) -> dict[str, Any]:
    """Evaluate a run's (or model's) model again; nothing is written.

    Args:
        source: A run folder, a model folder, or a model by name.
        data: Location of the run's own data, if they have moved.
        test_on: Other data to test on.
        tta: Also report test-time augmentation.

    Returns:
        The content of ``test.json``, and as ``confusion_matrix`` the rows of ``confusion_matrix.csv``.
    """
    set_num_threads()
    bundle, dataset = load_evaluation_data(source, data, test_on=test_on)
    views = make_tta(bundle.training["recipe"].get("hflip", False)) if tta else None
    test, _ = Classifier(bundle).test(dataset.test, views)
    return test.to_json()


def evaluate_corruptions(
    source: str | Path, data: Any = None, *, test_on: Any = None
) -> tuple[float, dict[str, list[float]]]:
    """Return the accuracy on clean test images, and by corruption the accuracies at severities 1 to 5."""
    set_num_threads()
    bundle, dataset = load_evaluation_data(source, data, test_on=test_on)
    classifier = Classifier(bundle)
    clean = Scores.of(classifier.logits(dataset.test.images), dataset.test.labels).accuracy
    accuracies: dict[str, list[float]] = {}
    work = [(kind, severity) for kind in CORRUPTIONS for severity in SEVERITIES]
    for kind, severity in track(work, "testing corrupted images", len(work)):
        images = corrupt(dataset.test.images, kind, severity)
        accuracy = Scores.of(classifier.logits(images), dataset.test.labels).accuracy
        accuracies.setdefault(kind, []).append(accuracy)
    return clean, accuracies
