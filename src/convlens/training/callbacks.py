"""Callbacks of the training loop: progress bar, snapshots, live status, TensorBoard."""

from __future__ import annotations

import base64
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from convlens.data.dataset import Dataset
from convlens.data.normalize import Normalize
from convlens.evaluation.inference import compute_logits
from convlens.explain.snapshots import write_snapshot
from convlens.run_dir import RunDir
from convlens.system.extras import missing_extra
from convlens.system.files import write_json_best_effort
from convlens.system.progress import ProgressBar
from convlens.training.metrics import Progress
from convlens.training.state import METRIC_COLUMNS, EpochRecord


class Callback:
    """Hooks of :func:`convlens.fit`; the base class ignores them all."""

    def on_train_start(self, records: Sequence[EpochRecord]) -> None:
        """Called once, before the first step, with the records of the epochs that a resumed training has done."""

    def on_epoch_start(self, epoch: int, epochs: int | None) -> None:
        """Called before the first step of an epoch, or the first after resuming within it.

        Args:
            epoch: Number of the epoch, from 1.
            epochs: Number of epochs in all; None if the recipe has ``max_seconds``.
        """

    def on_step_end(self, progress: Progress) -> None:
        """Called every 20 steps and after the last step of each epoch."""

    def on_snapshot(self, step: int, model: nn.Module) -> None:
        """Called before the first step, after 1, 2, 4, 8, ... steps of the first epoch, and after every epoch.

        Here and in :meth:`on_epoch_end` the model has the weights that would be tested, such as averaged ones, and must
        be left as it is. The time is not counted as training.

        Args:
            step: Number of steps done.
            model: The model.
        """

    def on_epoch_end(self, record: EpochRecord, model: nn.Module) -> None:
        """Called after an epoch has been evaluated."""

    def on_train_end(self) -> None:
        """Called once, at the end of the training, also if it ends with an exception."""

    def should_stop(self, step: int) -> bool:
        """Return True to stop after ``step`` steps; called on every rank, before the first and after every step.

        The training is saved, and ``fit`` raises TrainingInterruptedError.
        """
        return False


class CallbackList(Callback):
    """Calls each hook of several callbacks, in order; as a context manager, it calls on_train_end at the end."""

    def __init__(self, callbacks: Iterable[Callback]):
        self._callbacks = list(callbacks)

    def __enter__(self) -> CallbackList:
        return self

    def __exit__(self, *_: object) -> None:
        self.on_train_end()

    def on_train_start(self, records: Sequence[EpochRecord]) -> None:
        """Call the hook of all callbacks."""
        for callback in self._callbacks:
            callback.on_train_start(records)

    def on_epoch_start(self, epoch: int, epochs: int | None) -> None:
        """Call the hook of all callbacks."""
        for callback in self._callbacks:
            callback.on_epoch_start(epoch, epochs)

    def on_step_end(self, progress: Progress) -> None:
        """Call the hook of all callbacks."""
        for callback in self._callbacks:
            callback.on_step_end(progress)

    def on_snapshot(self, step: int, model: nn.Module) -> None:
        """Call the hook of all callbacks."""
        for callback in self._callbacks:
            callback.on_snapshot(step, model)

    def on_epoch_end(self, record: EpochRecord, model: nn.Module) -> None:
        """Call the hook of all callbacks."""
        for callback in self._callbacks:
            callback.on_epoch_end(record, model)

    def on_train_end(self) -> None:
        """Call the hook of all callbacks."""
        for callback in self._callbacks:
            callback.on_train_end()

    def should_stop(self, step: int) -> bool:
        """Return True if a callback asks to stop."""
        return any(callback.should_stop(step) for callback in self._callbacks)


class StopWhen(Callback):
    """Stops the training as soon as a function returns True.

    Args:
        condition: Called before the first and after every step.
    """

    def __init__(self, condition: Callable[[], bool]):
        self._condition = condition

    def should_stop(self, step: int) -> bool:
        """Return the function's answer."""
        return self._condition()


class ProgressBarCallback(Callback):
    """Shows a progress bar for every epoch, on standard error."""

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None

    def on_epoch_start(self, epoch: int, epochs: int | None) -> None:
        """Open a bar."""
        self._bar = ProgressBar(f"epoch {epoch}" + ("" if epochs is None else f" of {epochs}"), 1.0)

    def on_step_end(self, progress: Progress) -> None:
        """Move the bar; close it after the last step of the epoch, because the evaluation has a bar of its own."""
        if self._bar is not None:
            self._bar.update(progress.epoch_done - self._bar.done, str(progress))
        if progress.epoch_done >= 1:
            self.on_train_end()

    def on_train_end(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.__exit__()
        self._bar = None


class SnapshotCallback(Callback):
    """Writes snapshots of the weights, for ``convlens timelapse``.

    Args:
        folder: Where to write them.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def on_snapshot(self, step: int, model: nn.Module) -> None:
        """Write a snapshot."""
        write_snapshot(self._folder, step, model)


class TensorBoardLogger(Callback):
    """Writes a TensorBoard curve for every column of ``metrics.csv``.

    Args:
        folder: Where to write; its content is replaced.

    Raises:
        UsageError: If the package ``tensorboard`` is missing.
    """

    def __init__(self, folder: Path):
        writer = find_tensorboard()
        shutil.rmtree(folder, ignore_errors=True)  # a resumed training logs its first epochs again
        self._writer: Any = writer(str(folder))

    def on_train_start(self, records: Sequence[EpochRecord]) -> None:
        """Log the epochs of an interrupted training."""
        for record in records:
            self._log(record)

    def on_epoch_end(self, record: EpochRecord, model: nn.Module) -> None:
        """Log loss and accuracy of each split that is measured, and the learning rate."""
        self._log(record)

    def _log(self, record: EpochRecord) -> None:
        for name in METRIC_COLUMNS:
            split, _, what = name.rpartition("_")
            if split and (value := getattr(record, name)) is not None:
                self._writer.add_scalar(f"{'accuracy' if what == 'acc' else what}/{split}", value, record.epoch)
        self._writer.add_scalar("learning rate", record.lr, record.epoch)
        self._writer.flush()

    def on_train_end(self) -> None:
        """Close the file."""
        self._writer.close()


def find_tensorboard() -> Any:
    """Return PyTorch's SummaryWriter; UsageError if the package ``tensorboard`` is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise missing_extra("`tensorboard` needs an extra package", "tensorboard") from None
    return SummaryWriter


class LiveStatus(Callback):
    """Writes the live status of a run, which ``convlens watch`` shows.

    ``progress.json`` is written twice a second at most. Misclassified validation images are looked for after the first
    and the last epoch, and in between only as often as takes 1% of the time. Files that cannot be written are left out.

    Args:
        folder: Folder of the run.
        dataset: Its data, with the validation split.
        normalize: Normalization of the images.
        batch_size: Images that fit into memory at once.
    """

    MAX_IMAGES = 1000  # validation images that are classified
    MAX_SHOWN = 12  # misclassified images that are written
    TIME_FRACTION = 0.01  # of the training, for classifying them
    WRITE_INTERVAL_SECONDS = 0.5

    def __init__(self, folder: RunDir, dataset: Dataset, normalize: Normalize, batch_size: int = 500):
        self._folder, self._dataset, self._normalize = folder, dataset, normalize
        self._batch_size = min(batch_size, 500)
        self._written = self._evaluated = self._cost = 0.0  # seconds
        self._ended = False

    def on_step_end(self, progress: Progress) -> None:
        """Write the progress, unless it was written a moment ago and the training goes on."""
        self._ended = progress.step >= progress.total
        if self._ended or time.monotonic() - self._written >= self.WRITE_INTERVAL_SECONDS:
            self._written = time.monotonic()
            values = dataclasses.asdict(progress)
            del values["epoch_done"]
            write_json_best_effort(self._folder.progress, values)

    def on_epoch_end(self, record: EpochRecord, model: nn.Module) -> None:
        """Write some misclassified validation images, the most confident first, unless that takes too long."""
        split, started = self._dataset.validation, time.monotonic()
        if split is None or (not self._ended and self._cost > self.TIME_FRACTION * (started - self._evaluated)):
            return
        part = split.select(split.evenly_spaced(self.MAX_IMAGES))
        logits = compute_logits(model, part.images, self._normalize, batch_size=self._batch_size)
        confidence, predicted = logits.softmax(dim=1).cpu().max(dim=1)
        wrong = (predicted != part.labels).nonzero().squeeze(1)
        rows: list[int] = wrong[confidence[wrong].argsort(descending=True)].tolist()
        classes = self._dataset.classes
        mistakes = [
            {
                "label": classes[int(part.labels[row])],
                "guess": classes[int(predicted[row])],
                "probability": round(float(confidence[row]), 4),
                "pixels": base64.b64encode(part.images[row].numpy().tobytes()).decode(),
            }
            for row in rows[: self.MAX_SHOWN]
        ]
        about = {"epoch": record.epoch, "asked": len(part), "wrong": len(rows), "shape": list(self._dataset.shape)}
        write_json_best_effort(self._folder.mistakes, {**about, "mistakes": mistakes})
        self._evaluated = time.monotonic()
        self._cost = self._evaluated - started
