"""What the command prints: the lines of a training, tables, predictions as text, JSON or CSV."""

from __future__ import annotations

import csv
import inspect
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convlens.system.text import first_few

if TYPE_CHECKING:
    from convlens.audit.audit import AuditReport
    from convlens.inference.predictor import Prediction
    from convlens.runs.experiment import Experiment
    from convlens.sweep.study import Sweep
    from convlens.training.state import EpochRecord


SKEWED = 5.0  # so many times as many images in one class as in another are worth a warning


class Format(StrEnum):
    """How results are printed."""

    text = "text"
    json = "json"
    csv = "csv"


def echo(line: str) -> None:
    """Print a line at once; a reader who has gone away (``| head``) does not stop a training."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends


def describe_experiment(experiment: Experiment) -> None:
    """Print what is about to be trained, on what, where."""
    import torch

    from convlens.data.loader import count_batches

    recipe, dataset, config = experiment.recipe, experiment.dataset, experiment.config
    channels, height, width = dataset.shape
    counts = ", ".join(f"{len(split):,} {name}" for name, split in dataset.splits.items())
    steps = count_batches(len(dataset.train), recipe.batch_size)
    tests = len(range(0, len(dataset.test), recipe.batch_size))  # the last one may be smaller
    total = recipe.total_steps(steps)
    length = f"{count(math.ceil(total / steps), 'epoch')} ({total:,} steps)"
    if recipe.max_seconds is not None:
        length = f"{recipe.max_seconds:,.1f} s of training"
    model, machine = config["model"], config["machine"]
    sizes = torch.bincount(dataset.train.labels, minlength=len(dataset.classes))
    echo(f"data    {dataset.name}: {counts} images {channels}x{height}x{width}, {len(dataset.classes)} classes")
    if dataset.source and Path(dataset.source).exists():
        echo(f"        {dataset.note}")
    if dataset.unreadable:
        some = first_few(dataset.unreadable, 3, "; ")
        echo(f"        {count(len(dataset.unreadable), 'unreadable file')} skipped: {some}")
    if sizes.max() > SKEWED * sizes.min() and not recipe.balanced_sampling:
        most, least = (dataset.classes[int(row)] for row in (sizes.argmax(), sizes.argmin()))
        echo(
            f"        class {most!r} has {int(sizes.max()):,} images and {least!r} {int(sizes.min()):,}: "
            "--balanced-sampling shows both as often"
        )
    echo(f"net     {model['name']}: {model['parameters']:,} parameters")
    if "init" in config:
        echo(f"        started from {config['init']['from']}: {config['init']['tensors']} tensors")
    echo(f"recipe  {recipe.name}: {length} of {steps} train batches of {recipe.batch_size}, {tests} test batches")
    threads = count(machine["threads"], "thread")
    if (processes := machine.get("processes", 1)) > 1:
        threads = f"{processes} processes of {threads}"
    echo(f"on      {machine['device_name']}, {threads}, {recipe.precision}")
    if any(experiment.folder.checkpoint.glob("*.json")):
        told = experiment.folder.metrics.exists() and bool(experiment.folder.read_metrics())
        again = "; the epochs that it has behind it are told again first" if told else ""
        echo(f"        goes on from its last checkpoint{again}")
    elif experiment.folder.metrics.exists():
        echo("        its checkpoints are gone: it begins anew")
    for change in config.get("resumed", []):
        echo(f"        since it was started, another {change}: the last digits may differ")
    echo(f"run     {experiment.folder.path}")


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
    low, high = test["accuracy_ci95"]
    line = (
        f"test    accuracy {test['accuracy']:.2%} (95% interval {low:.2%} to {high:.2%}, n = {test['num_images']:,}), "
        f"loss {test['loss']:.4f}"
    )
    line += f"\n        balanced accuracy {test['balanced_accuracy']:.2%}, macro-F1 {test['macro_f1']:.2%}"
    if calibration := test.get("calibration"):
        before, after = (calibration[when]["ece"] for when in ("before", "after"))
        line += f"; calibration error {after:.2%}" + (f" ({before:.2%} before)" if before != after else "")
    if views := test.get("test_time_augmentation"):
        low, high = views["accuracy_ci95"]
        line += f"\n        {views['accuracy']:.2%} with test-time augmentation ({low:.2%} to {high:.2%})"
    return line


def describe_series(summary: dict[str, Any]) -> list[str]:
    """Return the lines that say what came of a series."""
    lines = []
    for name, run in summary["runs"].items():
        low, high = run["accuracy_ci95"]
        lines.append(f"{name:<8} accuracy {run['accuracy']:.2%} (95% interval {low:.2%} to {high:.2%})")
    lines.append(
        f"all {summary['n']}    {summary['mean']:.2%} +- {100 * summary['sd']:.2f} (mean +- sd), "
        f"worst {summary['worst']['accuracy']:.2%}, best {summary['best']['accuracy']:.2%}"
    )
    if together := summary.get("together"):
        low, high = together["accuracy_ci95"]
        lines.append(
            f"         {together['accuracy']:.2%} of all {together['num_images']:,} images, each tested on once "
            f"(95% interval {low:.2%} to {high:.2%})"
        )
    return lines


def describe_params(params: Mapping[str, Any]) -> str:
    """Return the values of a trial: "lr 0.05, batch-size 64"."""
    return ", ".join(
        f"{name.replace('_', '-')} {f'{value:.3g}' if isinstance(value, float) else value}"
        for name, value in params.items()
    )


def describe_sweep(sweep: Sweep, jobs: int) -> list[str]:
    """Return the lines that say what is about to be searched, on what, from which recipe."""
    data, plan = sweep.data, sweep.plan
    assert data.validation is not None
    images = f"{len(data.train):,} train, {len(data.validation):,} validation images"
    lines = [
        f"data    {data.name}: {images}; no trial looks at the test images",
        f"base    recipe {sweep.base.name}, seed {sweep.base.seed}",
        *(f"        {note}" for note in sweep.notes),
        *(f"search  {name.replace('_', '-')}: {values}" for name, values in plan["space"].items()),
        f"sweep   {sweep.folder}: {count(plan['trials'], 'trial')}, {jobs} at a time",
    ]
    if sweep.joined:
        lines.append("        goes on with what is in its storage, together with whoever else works on it")
    return lines


def describe_trial(row: Mapping[str, Any], fields: Iterable[str], so_far: str) -> str:
    """Return the line of a trial that has ended, as wide as the terminal at most; trials.csv has it all."""
    what = f"val {row['val_acc']:>6.2%}" if row["state"] == "complete" else f"{row['state']:>10}"
    line = f"trial {row['trial']:>3}  {what}  {so_far}"
    if row["state"] not in ("complete", "pruned"):
        return f"{line}  {row['reason']}"
    values = [describe_params({name: row[name]}) for name in fields if row[name] is not None]
    room, told = shutil.get_terminal_size().columns - len(line) - 2, ", ".join(values)
    while len(told) > room and len(values) > 1:  # one is always shown
        values.pop()
        told = ", ".join([*values, "..."])
    return f"{line}  {told}"


def rank_trial(row: Mapping[str, Any]) -> tuple[float, float, int]:
    """Return what complete trials are ordered by: accuracy; of equals the loss, then the number."""
    return -row["val_acc"], row["val_loss"] or 0.0, row["trial"]


def print_trials(rows: Sequence[Mapping[str, Any]], fields: Sequence[str], most: int = 10) -> None:
    """Print the best trials of a sweep as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    complete = sorted((r for r in rows if r["state"] == "complete"), key=rank_trial)[:most]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("trial", "val acc", "val loss", "epochs", "seconds", *(field.replace("_", "-") for field in fields)):
        table.add_column(name, justify="right")
    for row in complete:
        values = (f"{row[n]:.4g}" if isinstance(row[n], float) else str(row[n]) for n in fields)
        figures = (
            str(row["trial"]),
            f"{row['val_acc']:.2%}",
            f"{row['val_loss']:.4f}",
            str(row["epochs"]),
            f"{row['seconds']:.1f}",
        )
        table.add_row(*figures, *values)
    width = None if sys.stdout.isatty() else 200  # what is read by programs is not folded
    Console(file=sys.stdout, width=width, highlight=False).print(table)


def describe_findings(findings: AuditReport) -> list[str]:
    """Return what the doctor found, in words: the first few of each kind."""

    def some(names: Sequence[str]) -> str:
        return first_few(names, 5, "; ")

    lines = [f"{findings.data}: {findings.images:,} images"]
    if findings.unreadable:
        lines.append(f"{count(len(findings.unreadable), 'unreadable file')}: {some(findings.unreadable)}")
    if findings.one_colour:
        lines.append(f"{count(len(findings.one_colour), 'image')} of one colour: {some(findings.one_colour)}")
    if small := findings.small_classes:
        told = [f"{label!r} has {number:,}" for label, number in sorted(small.items(), key=lambda one: one[1])]
        number = f"{len(small)} classes have" if len(small) > 1 else "1 class has"
        lines.append(f"{number} too few training images to learn from: {some(told)}")
    if findings.imbalance > SKEWED:
        lines.append(
            f"the largest class has {findings.imbalance:.1f} times the images of the smallest; see --balanced-sampling"
        )
    for found, kind in ((findings.copies, "exact copies"), (findings.near_copies, "near copies")):
        if found:
            groups = [" = ".join(group[:3]) + " = ..." * (len(group) > 3) for group in found]
            lines.append(f"{count(len(found), 'group')} of {kind}: {some(groups)}")
    if findings.leaks:
        why = "what is trained on is tested on, or chosen by"
        lines.append(f"{count(findings.leaks, 'group')} of copies in more than one split: {why}")
    if findings.suspects:
        told = [f"{s.image} ({s.label}? rather {s.likely})" for s in findings.suspects]
        lines.append(f"{count(len(told), 'label')} likely wrong: {some(told)}")
    if findings.not_judged:
        lines.append(f"labels were not judged: {findings.not_judged}")
    if findings.shift > 0.6:
        lines.append(
            f"test images differ from the others: a simple model tells them apart (AUROC {findings.shift:.2f})"
        )
    return lines if len(lines) > 1 else [*lines, "nothing wrong was found"]


def print_corruptions(model: str, clean: float, figures: dict[str, list[float]], format: Format) -> None:
    """Print a model's accuracy at each severity of each corruption, the mean of all, and that on clean images."""
    every = [value for values in figures.values() for value in values]
    mean = sum(every) / len(every)
    if format is Format.json:
        print(json.dumps({"clean": clean, "accuracy": figures, "mean": mean}, indent=2))
        return
    show = "{:.4f}".format if format is Format.csv else "{:.2%}".format
    head = ("corruption", *(f"severity {number + 1}" for number in range(len(next(iter(figures.values()))))), "mean")
    rows = [head, *((kind, *map(show, v), show(sum(v) / len(v))) for kind, v in figures.items())]
    if format is Format.csv:
        print_csv(rows)
    else:
        print_table(rows)
    told = f"{model}: accuracy {mean:.2%} on average of these, {clean:.2%} on the test images as they are"
    print(told, file=sys.stderr if format is Format.csv else sys.stdout)


class Printer:
    """Prints predictions as they come: text and CSV line by line, JSON as one list."""

    def __init__(self, format: Format):
        self.format = format
        self._rows: list[dict[str, Any]] = []
        if format is Format.csv:
            print_csv([("image", "rank", "label", "probability", "known", "set")])

    def add(self, image: str, prediction: Prediction) -> None:
        """Print, or keep for the end, what was predicted for one image."""
        best, labels = prediction.top, prediction.prediction_set
        if self.format is Format.text:
            told = ", ".join(f"{label} {probability:.1%}" for label, probability in best)
            told = f"unknown (most like {told})" if prediction.in_distribution is False else told
            print(f"{image}: {told}" + ("" if labels is None else f"  set: {', '.join(labels) or 'empty'}"))
        elif self.format is Format.csv:
            known = "" if prediction.in_distribution is None else str(prediction.in_distribution).lower()
            rest = (known, "|".join(labels or ()))
            print_csv([(image, rank, label, f"{p:.6f}", *rest) for rank, (label, p) in enumerate(best, start=1)])
        else:
            top = [{"label": label, "probability": round(p, 6)} for label, p in best]
            row = {"image": image, **top[0], "known": prediction.in_distribution, "top": top}
            self._rows.append(row if labels is None else {**row, "set": list(labels)})

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
