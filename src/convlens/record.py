"""What a run folder says of its training: the command, the data, a row an epoch, a row an image."""

from __future__ import annotations

import base64
import dataclasses
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convlens.data.builtin import DATASETS
from convlens.data.dataset import Dataset
from convlens.data.normalize import Normalise
from convlens.errors import UsageError
from convlens.evaluation.inference import compute_logits
from convlens.explain.snapshots import write_snapshot
from convlens.run_dir import RunFolder
from convlens.system.files import write_csv, write_loosely
from convlens.training.checkpoint import EpochRecord
from convlens.training.engine import Watcher
from convlens.training.recipe import Recipe
from convlens.training.tally import Progress

METRIC_COLUMNS = [field.name for field in dataclasses.fields(EpochRecord)]
TEST_COLUMNS = ("test_loss", "test_acc")  # only where the recipe watches the test split


def command_line() -> str:
    """Return the command that runs, as a person would type it; ``python`` for calls from Python."""
    program = Path(sys.argv[0])
    if program.stem != "convlens" and program.parts[-2:] != ("convlens", "__main__.py"):
        return "convlens.train(...) in Python"
    return shlex.join(["convlens", *sys.argv[1:]])


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
        "fold": list(dataset.fold) if dataset.fold else None,
        "left_out": len(dataset.left_out),
        "fingerprint": fingerprint,
        "test_fingerprint": dataset.test.fingerprint(),
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


def summarise_test(test: dict[str, Any]) -> dict[str, Any]:
    """Return what a bundle carries of ``test.json``: what its model card tells."""
    carried: dict[str, Any] = {
        key: test[key] for key in ("n", "accuracy", "accuracy_interval", "loss", "known") if key in test
    }
    if calibration := test.get("calibration"):
        carried["calibration_error"] = [calibration[when]["calibration_error"] for when in ("before", "after")]
    return carried


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
    rows = ((name, image) for name, split in dataset.splits.items() for image in split.ids)
    write_csv(folder.split, ["split", "id"], rows)


class Board:
    """Files for TensorBoard, a curve for every column of ``metrics.csv``; nothing, unless they are ``wanted``.

    Raises UsageError if the package is missing.
    """

    def __init__(self, folder: Path, *, wanted: bool):
        self._writer: Any = None
        if wanted:
            writer = find_tensorboard()
            shutil.rmtree(folder, ignore_errors=True)  # a resumed training tells of its first epochs again
            self._writer = writer(str(folder))

    def add(self, record: EpochRecord) -> None:
        """Add an epoch: loss and accuracy of each split that is measured, and the learning rate."""
        if self._writer is None:
            return
        for name in METRIC_COLUMNS:
            split, _, what = name.rpartition("_")
            if split and (value := getattr(record, name)) is not None:
                self._writer.add_scalar(f"{'accuracy' if what == 'acc' else what}/{split}", value, record.epoch)
        self._writer.add_scalar("learning rate", record.lr, record.epoch)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


def find_tensorboard() -> Any:
    """Return PyTorch's writer for TensorBoard; UsageError if the package that it needs is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard needs a package more: pip install 'convlens[tensorboard]'") from None
    return SummaryWriter


class LiveRecord(Watcher):
    """What `convlens watch` shows of a training under way, and its snapshots, if they are wanted.

    Where it stands is written twice a second at most. What it has wrong is looked at after the first epoch, after the
    last, and in between so seldom that it takes a hundredth of the time. What cannot be written is left out; but
    snapshots were asked for.
    """

    ASKED = 1000  # validation images, of which some are wrong
    SHOWN = 12
    SHARE = 0.01  # of the time, for looking for mistakes
    PAUSE = 0.5  # seconds between two writes

    def __init__(self, folder: RunFolder, dataset: Dataset, normalise: Normalise, recipe: Recipe):
        self.folder, self.dataset, self.normalise, self.recipe = folder, dataset, normalise, recipe
        self._told = self._looked = self._took = 0.0
        self._ended = False

    def tell(self, progress: Progress) -> None:
        """Write where the training stands, if the last time is a while ago or it has ended."""
        self._ended = progress.step >= progress.total
        if self._ended or time.monotonic() - self._told >= self.PAUSE:
            self._told = time.monotonic()
            write_loosely(self.folder.progress, dataclasses.asdict(progress))

    def keep(self, step: int, net: nn.Module) -> None:
        """Keep a snapshot, if the recipe says so."""
        if self.recipe.snapshots:
            write_snapshot(self.folder.snapshots, step, net)

    def look(self, epoch: int, net: nn.Module) -> None:
        """Write some of the validation images that the net has wrong, the surest first, unless that takes too long."""
        split, began = self.dataset.validation, time.monotonic()
        if split is None or (not self._ended and self._took > self.SHARE * (began - self._looked)):
            return
        part = split.take(split.spread(self.ASKED))
        logits = compute_logits(net, part.images, self.normalise, batch_size=min(self.recipe.batch_size, 500))
        shares, guesses = logits.softmax(dim=1).cpu().max(dim=1)
        wrong = (guesses != part.labels).nonzero().squeeze(1)
        rows: list[int] = wrong[shares[wrong].argsort(descending=True)].tolist()
        classes = self.dataset.classes
        mistakes = [
            {
                "label": classes[int(part.labels[row])],
                "guess": classes[int(guesses[row])],
                "probability": round(float(shares[row]), 4),
                "pixels": base64.b64encode(part.images[row].numpy().tobytes()).decode(),
            }
            for row in rows[: self.SHOWN]
        ]
        about = {"epoch": epoch, "asked": len(part), "wrong": len(rows), "shape": list(self.dataset.shape)}
        write_loosely(self.folder.mistakes, {**about, "mistakes": mistakes})
        self._looked = time.monotonic()
        self._took = self._looked - began
