"""What the commands print: the lines of a training, tables, predictions as text, JSON or CSV."""

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

from convlens.inference.table import num_probabilities, probability_cells, probability_columns
from convlens.system.text import first_few

if TYPE_CHECKING:
    from convlens.audit.audit import AuditReport
    from convlens.data.dataset import Dataset
    from convlens.inference.predictor import Prediction
    from convlens.runs.experiment import Experiment
    from convlens.runs.group import GroupSummary
    from convlens.sweep.study import Sweep
    from convlens.training.recipe import Recipe
    from convlens.training.state import EpochRecord


SKEWED = 5.0  # ratio of class sizes that is worth a warning


class Format(StrEnum):
    """Output formats."""

    text = "text"
    json = "json"
    csv = "csv"


def echo(line: str) -> None:
    """Print a line at once; a closed pipe (``| head``) does not stop a training."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def describe_experiment(experiment: Experiment) -> None:
    """Print what is about to be trained, on which data and device."""
    recipe, config, run_dir = experiment.recipe, experiment.config, experiment.run_dir
    print_data(experiment.dataset, balanced=recipe.balanced_sampling)
    echo(f"model   {config.model['name']}: {config.model['parameters']:,} parameters")
    if config.init_from:
        echo(f"        initialized from {config.init_from.source}: {config.init_from.num_tensors} tensors")
    echo(f"recipe  {recipe.name}: {describe_length(experiment.dataset, recipe)}")
    threads = count(config.machine["threads"], "thread")
    if (processes := config.machine.get("processes", 1)) > 1:
        threads = f"{processes} processes of {threads}"
    echo(f"on      {config.machine['device_name']}, {threads}, {recipe.precision}")
    if any(run_dir.checkpoint.glob("*.json")):
        repeats = run_dir.metrics.exists() and bool(run_dir.read_metrics())
        echo("        resumes from its last checkpoint" + "; earlier epochs are printed again" * repeats)
    elif run_dir.metrics.exists():
        echo("        its checkpoints are missing: training starts over")
    for change in config.environment_changes:
        echo(f"        since its start, another {change}: the last digits may differ")
    echo(f"run     {run_dir.path}")


def print_data(dataset: Dataset, *, balanced: bool) -> None:
    """Print the size of a data set, its unreadable files, and a hint if its classes are skewed."""
    import torch

    channels, height, width = dataset.shape
    counts = ", ".join(f"{len(split):,} {name}" for name, split in dataset.splits.items())
    echo(f"data    {dataset.name}: {counts} images {channels}x{height}x{width}, {len(dataset.classes)} classes")
    if dataset.source and Path(dataset.source).exists():
        echo(f"        {dataset.split_description}")
    if dataset.unreadable:
        some = first_few(dataset.unreadable, 3, "; ")
        echo(f"        {count(len(dataset.unreadable), 'unreadable file')} skipped: {some}")
    sizes = torch.bincount(dataset.train.labels, minlength=len(dataset.classes))
    if sizes.max() > SKEWED * sizes.min() and not balanced:
        largest, smallest = (dataset.classes[int(row)] for row in (sizes.argmax(), sizes.argmin()))
        echo(
            f"        class {largest!r} has {int(sizes.max()):,} images and {smallest!r} {int(sizes.min()):,}: "
            "--balanced-sampling shows both equally often"
        )


def describe_length(dataset: Dataset, recipe: Recipe) -> str:
    """Return the length of a training: "7 epochs (826 steps) of 118 train batches of 512, 20 test batches"."""
    from convlens.data.loader import count_batches

    steps = count_batches(len(dataset.train), recipe.batch_size)
    tests = len(range(0, len(dataset.test), recipe.batch_size))  # the last batch may be smaller
    total = recipe.total_steps(steps)
    length = f"{count(math.ceil(total / steps), 'epoch')} ({total:,} steps)"
    if recipe.max_seconds is not None:
        length = f"{recipe.max_seconds:,.1f} s of training"
    return f"{length} of {steps} train batches of {recipe.batch_size}, {tests} test batches"


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
    """Return the lines of a test."""
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


def describe_group(summary: GroupSummary) -> list[str]:
    """Return the lines of a group's summary."""
    lines = []
    for name, run in summary.runs.items():
        low, high = run["accuracy_ci95"]
        lines.append(f"{name:<8} accuracy {run['accuracy']:.2%} (95% interval {low:.2%} to {high:.2%})")
    lines.append(
        f"all {summary.n}    {summary.mean:.2%} +- {100 * summary.sd:.2f} (mean +- sd), "
        f"worst {summary.worst['accuracy']:.2%}, best {summary.best['accuracy']:.2%}"
    )
    if pooled := summary.pooled:
        low, high = pooled["accuracy_ci95"]
        lines.append(
            f"         {pooled['accuracy']:.2%} of all {pooled['num_images']:,} images, each tested once "
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
    """Return the lines of a sweep that is about to start: data, base recipe, search space."""
    data, plan = sweep.data, sweep.plan
    assert data.validation is not None
    images = f"{len(data.train):,} train, {len(data.validation):,} validation images"
    lines = [
        f"data    {data.name}: {images}; trials never see the test images",
        f"base    recipe {sweep.base.name}, seed {sweep.base.seed}",
        *(f"search  {name.replace('_', '-')}: {values}" for name, values in plan["space"].items()),
        f"sweep   {sweep.folder}: {count(plan['trials'], 'trial')}, {jobs} at a time",
    ]
    if sweep.joined:
        lines.append("        continues the study in its storage, together with other workers")
    return lines


def describe_trial(row: Mapping[str, Any], fields: Iterable[str], so_far: str) -> str:
    """Return the line of a finished trial, at most as wide as the terminal; trials.csv has all values."""
    what = f"val {row['val_acc']:>6.2%}" if row["state"] == "complete" else f"{row['state']:>10}"
    line = f"trial {row['trial']:>3}  {what}  {so_far}"
    if row["state"] not in ("complete", "pruned"):
        return f"{line}  {row['reason']}"
    values = [describe_params({name: row[name]}) for name in fields if row[name] is not None]
    room, text = shutil.get_terminal_size().columns - len(line) - 2, ", ".join(values)
    while len(text) > room and len(values) > 1:  # at least one is shown
        values.pop()
        text = ", ".join([*values, "..."])
    return f"{line}  {text}"


def rank_trial(row: Mapping[str, Any]) -> tuple[float, float, int]:
    """Return the sort key of complete trials: accuracy, then loss, then number."""
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
    width = None if sys.stdout.isatty() else 200  # a pipe gets unwrapped lines
    Console(file=sys.stdout, width=width, highlight=False).print(table)


def describe_findings(findings: AuditReport) -> list[str]:
    """Return the findings of the data doctor, the first few of each kind."""

    def some(names: Sequence[str]) -> str:
        return first_few(names, 5, "; ")

    lines = [f"{findings.data}: {findings.num_images:,} images"]
    if findings.unreadable:
        lines.append(f"{count(len(findings.unreadable), 'unreadable file')}: {some(findings.unreadable)}")
    if findings.constant_images:
        lines.append(f"{count(len(findings.constant_images), 'image')} of one color: {some(findings.constant_images)}")
    if small := findings.small_classes:
        sizes = [f"{label!r} has {number:,}" for label, number in sorted(small.items(), key=lambda one: one[1])]
        number = f"{len(small)} classes have" if len(small) > 1 else "1 class has"
        lines.append(f"{number} too few training images to learn from: {some(sizes)}")
    if findings.imbalance > SKEWED:
        lines.append(
            f"the largest class has {findings.imbalance:.1f} times the images of the smallest; see --balanced-sampling"
        )
    for found, kind in ((findings.exact_duplicates, "exact duplicates"), (findings.near_duplicates, "near-duplicates")):
        if found:
            groups = [" = ".join(group[:3]) + " = ..." * (len(group) > 3) for group in found]
            lines.append(f"{count(len(found), 'group')} of {kind}: {some(groups)}")
    if findings.leaks:
        why = "training images are also in the test or validation split"
        lines.append(f"{count(findings.leaks, 'group')} of duplicates in more than one split: {why}")
    if findings.label_issues:
        issues = [f"{s.image_id} ({s.given_label}? probably {s.predicted_label})" for s in findings.label_issues]
        lines.append(f"{count(len(issues), 'label issue')}: {some(issues)}")
    if findings.label_check_skipped:
        lines.append(f"labels were not checked: {findings.label_check_skipped}")
    if findings.train_test_drift_auroc > 0.6:
        auroc = f"AUROC {findings.train_test_drift_auroc:.2f}"
        lines.append(f"test images differ from the others: a simple model separates them ({auroc})")
    return lines if len(lines) > 1 else [*lines, "no problems found"]


def print_corruptions(model: str, clean: float, figures: dict[str, list[float]], format: Format) -> None:
    """Print a model's accuracy at each severity of each corruption, the mean, and the accuracy on clean images."""
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
    line = f"{model}: accuracy {mean:.2%} on average, {clean:.2%} on the clean test images"
    print(line, file=sys.stderr if format is Format.csv else sys.stdout)


class PredictionPrinter:
    """Prints predictions as they arrive: text and CSV line by line, JSON as one list at the end.

    Args:
        format: Output format.
        classes: Classes of the model.
        top: Number of classes to print as text.
    """

    def __init__(self, format: Format, classes: Sequence[str], top: int):
        self.format, self.classes = format, classes
        self.num_classes = top if format is Format.text else num_probabilities(classes)
        labels = ["image_id", "predicted_label", "confidence"]
        self.columns = [*labels, *probability_columns(classes), "in_distribution", "prediction_set"]
        self._rows: list[dict[str, Any]] = []
        if format is Format.csv:
            print_csv([self.columns])

    def add(self, image: str, prediction: Prediction) -> None:
        """Print the prediction for one image, or keep it for the end."""
        best, known, members = prediction.top, prediction.in_distribution, prediction.prediction_set
        if self.format is Format.text:
            text = ", ".join(f"{label} {probability:.1%}" for label, probability in best)
            text = f"unknown (most like {text})" if known is False else text
            print(f"{image}: {text}" + ("" if members is None else f"  set: {', '.join(members) or 'empty'}"))
            return
        cells = probability_cells(self.classes, best)
        if self.format is Format.csv:
            answer = "" if known is None else str(known).lower()
            row = [image, prediction.label, f"{prediction.confidence:.6f}", *cells, answer, "|".join(members or ())]
            print_csv([row])
        else:
            numbers = [cell if column.endswith("_label") else float(cell) for column, cell in zip(
                self.columns[3:-2], cells, strict=True)]  # fmt: skip
            first = [image, prediction.label, round(prediction.confidence, 6)]
            values = [*first, *numbers, known, None if members is None else list(members)]
            self._rows.append(dict(zip(self.columns, values, strict=True)))

    def close(self) -> None:
        """Print what was kept."""
        if self.format is Format.json:
            print(json.dumps(self._rows, indent=2, ensure_ascii=False))


def first_line(thing: Any) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n", 1)[0]


def print_table(rows: list[Any], *, head: bool = True) -> None:
    """Print rows in columns, numbers aligned to the right."""
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
