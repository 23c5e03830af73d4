"""Callbacks of the training loop: live status, snapshots, TensorBoard."""

from __future__ import annotations

import base64
import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from torch import nn

from convlens.data.dataset import Dataset
from convlens.data.normalize import Normalize
from convlens.errors import UsageError
from convlens.evaluation.inference import compute_logits
from convlens.explain.snapshots import write_snapshot
from convlens.run_dir import RunDir
from convlens.system.files import write_json_best_effort
from convlens.training.metrics import Progress
from convlens.training.recipe import Recipe
from convlens.training.state import METRIC_COLUMNS, EpochRecord


class Callback:
    """Somebody who is told how a training goes; this one does nothing with it."""

    def tell(self, progress: Progress) -> None:
        """Hear where the training stands: every 20 steps, and at the end of an epoch."""

    def keep(self, step: int, net: nn.Module) -> None:
        """Get the net before the first step, after steps 1, 2, 4, 8, ... of the first epoch, and after every epoch.

        Here and in :meth:`look` it is as it would be tested, and must be left so. No time of training counts.
        """

    def look(self, epoch: int, net: nn.Module) -> None:
        """Get the net after an epoch that was trained just now."""


class TensorBoardLogger:
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


class LiveStatus(Callback):
    """What `convlens watch` shows of a training under way, and its snapshots, if they are wanted.

    Where it stands is written twice a second at most. What it has wrong is looked at after the first epoch, after the
    last, and in between so seldom that it takes a hundredth of the time. What cannot be written is left out; but
    snapshots were asked for.
    """

    ASKED = 1000  # validation images, of which some are wrong
    SHOWN = 12
    SHARE = 0.01  # of the time, for looking for mistakes
    PAUSE = 0.5  # seconds between two writes

    def __init__(self, folder: RunDir, dataset: Dataset, normalise: Normalize, recipe: Recipe):
        self.folder, self.dataset, self.normalise, self.recipe = folder, dataset, normalise, recipe
        self._told = self._looked = self._took = 0.0
        self._ended = False

    def tell(self, progress: Progress) -> None:
        """Write where the training stands, if the last time is a while ago or it has ended."""
        self._ended = progress.step >= progress.total
        if self._ended or time.monotonic() - self._told >= self.PAUSE:
            self._told = time.monotonic()
            write_json_best_effort(self.folder.progress, dataclasses.asdict(progress))

    def keep(self, step: int, net: nn.Module) -> None:
        """Keep a snapshot, if the recipe says so."""
        if self.recipe.save_snapshots:
            write_snapshot(self.folder.snapshots, step, net)

    def look(self, epoch: int, net: nn.Module) -> None:
        """Write some of the validation images that the net has wrong, the surest first, unless that takes too long."""
        split, began = self.dataset.validation, time.monotonic()
        if split is None or (not self._ended and self._took > self.SHARE * (began - self._looked)):
            return
        part = split.select(split.evenly_spaced(self.ASKED))
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
        write_json_best_effort(self.folder.mistakes, {**about, "mistakes": mistakes})
        self._looked = time.monotonic()
        self._took = self._looked - began
