"""Evaluate a finished run again, on its own test data, other data or corrupted images."""

from __future__ import annotations

from collections.abc import Sequence
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


def load_evaluation_data(source: str | Path, data: Any = None, *, other: bool = False) -> tuple[Bundle, Dataset]:
    """Return a run's or model's bundle, and the data set that it was trained and tested on.

    ``data`` says where that is now, if not where the run says; or it is ``other`` data, which are brought to the same
    form. Raises UsageError if the run's own data have changed, or other data have other classes or another size.
    """
    folder = resolve_bundle(source)
    bundle, run = load_bundle(folder), RunDir(folder.parent)
    preprocess = bundle.preprocess
    recorded = read_json(run.config)["data"] if run.test.is_file() else bundle.training["data"]
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
            dataset = as_recorded(dataset, recorded, read_name_list(run.excluded) if run.excluded.exists() else ())
        except UsageError:
            if data is None:
                raise
            raise UsageError(unlike) from None
    elif recorded.get("fold") and dataset.source == recorded["source"]:
        raise UsageError(f"{source} was trained on the test images of {data}: it is one fold; leave out --data")
    if dataset.classes != bundle.classes:
        raise UsageError(
            f"{named} has other classes than {source}: {describe_class_diff(dataset.classes, bundle.classes)}"
        )
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


def describe_class_diff(classes: Sequence[str], others: Sequence[str]) -> str:
    """Return what ``classes`` have and lack beside ``others``, in words: some of each."""
    mine, theirs = set(classes), set(others)
    more, fewer = [c for c in classes if c not in theirs], [c for c in others if c not in mine]
    told = [f"it {what} {first_few(names, 10)}" for what, names in (("lacks", fewer), ("alone has", more)) if names]
    return ", and ".join(told) or "the same in another order"


def evaluate_run(source: str | Path, data: Any = None, *, tta: bool = False) -> dict[str, Any]:
    """Test a run's (or model's) net again, on its own test split or on that of ``data``; nothing is written.

    Returns the values that ``test.json`` has, and as ``confusion_matrix`` the rows of ``confusion_matrix.csv``; with
    ``tta``, the metrics of test-time augmentation as well.
    """
    set_num_threads()
    bundle, dataset = load_evaluation_data(source, data, other=True)
    views = make_tta(bundle.training["recipe"].get("hflip", False)) if tta else None
    test, _ = Classifier(bundle).test(dataset.test, views)
    return test.to_json()


def evaluate_corruptions(source: str | Path, data: Any = None) -> tuple[float, dict[str, list[float]]]:
    """Return the accuracy on the test split as it is, and for each corruption at severities 1 to 5."""
    set_num_threads()
    bundle, dataset = load_evaluation_data(source, data, other=True)
    classifier = Classifier(bundle)
    clean = Scores.of(classifier.logits(dataset.test.images), dataset.test.labels).accuracy
    figures: dict[str, list[float]] = {}
    work = [(kind, severity) for kind in CORRUPTIONS for severity in SEVERITIES]
    for kind, severity in track(work, "testing corrupted images", len(work)):
        images = corrupt(dataset.test.images, kind, severity)
        accuracy = Scores.of(classifier.logits(images), dataset.test.labels).accuracy
        figures.setdefault(kind, []).append(accuracy)
    return clean, figures
