"""What the command prints: the lines of a training, tables, predictions as text, JSON or CSV."""

from __future__ import annotations

import csv
import inspect
import json
import math
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convlens.experiment import Experiment
    from convlens.training.checkpoint import EpochRecord


class Format(StrEnum):
    """How results are printed."""

    text = "text"
    json = "json"
    csv = "csv"


def say(line: str) -> None:
    """Print a line at once; a reader who has gone away (``| head``) does not stop a training."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends


def describe_experiment(experiment: Experiment) -> None:
    """Print what is about to be trained, on what, where."""
    from convlens.data.loader import count_batches
    from convlens.runtime import choose_device, describe_machine

    recipe, dataset, config = experiment.recipe, experiment.dataset, experiment.config
    channels, height, width = dataset.shape
    counts = ", ".join(f"{len(split):,} {name}" for name, split in dataset.splits.items())
    steps = count_batches(len(dataset.train), recipe.batch_size)
    tests = len(range(0, len(dataset.test), recipe.batch_size))  # the last one may be smaller
    total = recipe.total_steps(steps)
    length = f"{count(math.ceil(total / steps), 'epoch')} ({total:,} steps)"
    if recipe.seconds is not None:
        length = f"{recipe.seconds:,.1f} s of training"
    model, machine = config["model"], config["machine"]
    say(f"data    {dataset.name}: {counts} images {channels}x{height}x{width}, {len(dataset.classes)} classes")
    if dataset.source and Path(dataset.source).exists():
        say(f"        {dataset.note}")
    if dataset.unreadable:
        say(f"        {len(dataset.unreadable)} unreadable files skipped: {'; '.join(dataset.unreadable[:3])}")
    say(f"net     {model['name']}: {model['parameters']:,} parameters")
    if "init" in config:
        say(f"        started from {config['init']['from']}: {config['init']['tensors']} tensors")
    say(f"recipe  {recipe.name}: {length} of {steps} train batches of {recipe.batch_size}, {tests} test batches")
    threads = count(machine["threads"], "thread")
    say(f"on      {machine['device_name']}, {threads}, {recipe.precision}")
    now = describe_machine(choose_device(recipe.device))
    if differing := [key for key, value in machine.items() if now.get(key) != value]:
        say(f"        this run was started elsewhere (other {', '.join(differing)}): the last digits may differ")
    say(f"run     {experiment.folder.path}")


def count(number: int, thing: str) -> str:
    """Return a number and its noun: "1 epoch", "5 epochs"."""
    return f"{number:,} {thing}" + ("s" if number != 1 else "")


def describe_record(record: EpochRecord) -> str:
    """Return the line of an epoch."""
    line = f"epoch {record.epoch:>3}  {record.seconds:6.1f} s  loss {record.train_loss:.4f}  acc {record.train_acc:.2%}"
    for name, loss, accuracy in (
        ("val", record.val_loss, record.val_acc),
        ("test", record.test_loss, record.test_acc),
    ):
        if accuracy is not None:
            line += f"  {name} loss {loss:.4f}  acc {accuracy:.2%}"
    return line


def describe_test(test: dict[str, Any]) -> str:
    """Return the line of a test."""
    low, high = test["accuracy_interval"]
    line = (
        f"test    accuracy {test['accuracy']:.2%} (95% interval {low:.2%} to {high:.2%}, n = {test['n']:,}), "
        f"loss {test['loss']:.4f}"
    )
    if views := test.get("test_time_augmentation"):
        low, high = views["accuracy_interval"]
        line += f"\n        {views['accuracy']:.2%} with test-time augmentation ({low:.2%} to {high:.2%})"
    return line


class Printer:
    """Prints predictions as they come: text and CSV line by line, JSON as one list."""

    def __init__(self, format: Format, top: int):
        self.format, self.top = format, top
        self._rows: list[dict[str, Any]] = []
        if format is Format.csv:
            print_csv([("image", "rank", "label", "probability")])

    def add(self, image: str, best: tuple[tuple[str, float], ...]) -> None:
        """Print, or keep for the end, what was predicted for one image."""
        if self.format is Format.text:
            print(f"{image}: {', '.join(f'{label} {probability:.1%}' for label, probability in best)}")
        elif self.format is Format.csv:
            print_csv([(image, rank, label, f"{p:.6f}") for rank, (label, p) in enumerate(best, start=1)])
        else:
            top = [{"label": label, "probability": round(p, 6)} for label, p in best]
            self._rows.append({"image": image, **top[0], "top": top})

    def close(self) -> None:
        """Print what was kept."""
        if self.format is Format.json:
            print(json.dumps(self._rows, indent=2, ensure_ascii=False))


def first_line(thing: Any) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n", 1)[0]


def print_table(rows: list[Any], *, head: bool = True) -> None:
    """Print rows in columns: the first at the left, numbers at the right."""
    if not rows:
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        cells = []
        for cell, width in zip(row, widths, strict=True):
            numeric = cell.replace(",", "").replace(".", "").isdigit()
            cells.append(cell.rjust(width) if numeric else cell.ljust(width))
        print("  ".join(cells).rstrip())
        if head and number == 0:
            print("  ".join("-" * width for width in widths))


def print_csv(rows: list[Any]) -> None:
    """Print rows as CSV."""
    csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
