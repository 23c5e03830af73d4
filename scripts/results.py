"""Run the experiments of docs/results/accuracy.md that are not there yet, write its tables, and ship the models.

    python -m scripts.results runs        # train what is missing, one run after another (hours on two cores)
    python -m scripts.results table       # record what came of them in records/results.json, and write it into the
                                             # tables and the recipes' docstrings; a row without records stays as it is
    python -m scripts.results ship        # copy the bundles of seed 0 into the package

Run it in a folder that has ``cifar10-jpeg/`` and ``hymenoptera/`` (real data sets in class folders), with
CONVLENS_DATA pointing at MNIST and Fashion-MNIST. Every run is one ``convlens train`` command; its figures are
read from the run's own files.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import Record, put

from convlens.runs.run import Run

RUNS = Path("runs/results")
RESULTS = Path(__file__).parent.parent / "docs" / "results" / "accuracy.md"
RECIPES = Path(__file__).parent.parent / "src" / "convlens" / "training" / "recipes.py"
RECORDS = Path(__file__).parent.parent / "benchmarks" / "records" / "results.json"
README = Path(__file__).parent.parent / "README.md"
WEIGHTS = Path(__file__).parent.parent / "src" / "convlens" / "weights"
JPEG_COPY = "CIFAR-10 (JPEG copy)"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table: a command, and how many seeds it is run with."""

    name: str
    data: str
    arguments: str
    seeds: int


CLASSICS = [
    Row("fashion-2conv", "Fashion-MNIST", "fashion-mnist --recipe fashion-2conv", 5),
    Row("fashion-2conv-avg", "Fashion-MNIST", "fashion-mnist --recipe fashion-2conv --pool avg", 1),
    Row("folder-cnn", "hymenoptera photos", "hymenoptera --recipe folder-cnn", 5),
    Row("cifar-lenet", JPEG_COPY, "cifar10-jpeg --recipe cifar-lenet", 3),
    Row("cifar-lenet-no-relu", JPEG_COPY, "cifar10-jpeg --recipe cifar-lenet --no-output-relu", 3),
    Row("mnist-4conv", "MNIST", "mnist --recipe mnist-4conv", 1),
]
STRONG = [
    Row("digits", "digits", "digits", 10),
    Row("mnist", "MNIST", "mnist", 5),
    Row("fashion-mnist", "Fashion-MNIST", "fashion-mnist", 3),
    Row("cifar10-90", JPEG_COPY, "cifar10-jpeg --recipe cifar10-90", 3),
    Row("folder", "hymenoptera photos", "hymenoptera", 5),
]
FAST = [
    Row("mnist-99", "MNIST", "mnist --recipe mnist-99", 10),
    Row("mnist-99-fp32", "MNIST", "mnist --recipe mnist-99 --precision fp32", 5),
    Row("fashion-85", "Fashion-MNIST", "fashion-mnist --recipe fashion-85", 5),
    Row("fashion-92", "Fashion-MNIST", "fashion-mnist --recipe fashion-92", 5),
    Row("cifar10-small", JPEG_COPY, "cifar10-jpeg --recipe cifar10-small", 3),
    Row("cifar10-94", JPEG_COPY, "cifar10-jpeg --recipe cifar10-94", 3),
]
BEST = [
    Row("mnist-best", "MNIST", "mnist --recipe mnist-best", 2),
    Row("fashion-best", "Fashion-MNIST", "fashion-mnist --recipe fashion-best", 1),
    Row("cifar10-best", JPEG_COPY, "cifar10-jpeg --recipe cifar10-best", 1),
]
ROWS = [*STRONG, *FAST, *CLASSICS, *BEST]  # in the order in which they are run
# the models that come with convlens, and the rows of their runs
SHIPPED = {"digits": "digits", "mnist": "mnist", "fashion-mnist": "fashion-mnist", "cifar10": "cifar10-small"}
MACHINE = "on two cores of an AMD EPYC"


def run_missing(names: list[str]) -> None:
    """Train every run that is not finished, the quick ones first; ``names`` limits it to some rows."""
    for row in ROWS:
        if names and row.name not in names:
            continue
        for seed in range(row.seeds):
            folder = RUNS / f"{row.name}-s{seed}"
            if (folder / "test.json").exists():
                continue
            command = ["convlens", "train", *row.arguments.split(), "--seed", str(seed), "--out", str(folder)]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)


def collect() -> None:
    """Put what the finished runs here say into the records: a dict a seed, by the name of its row."""
    records = read_records()
    for row in ROWS:
        folders = sorted(RUNS.glob(f"{row.name}-s[0-9]*"))
        if runs := [Run(folder) for folder in folders if (folder / "test.json").exists()]:
            records[row.name] = [summarise(run) for run in runs]
    RECORDS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def summarise(run: Run) -> Record:
    """Return what the tables need of a run."""
    test, config = run.test, run.config
    kept: Record = {key: test[key] for key in ("num_images", "accuracy", "accuracy_ci95", "loss")}
    for key in ("balanced_accuracy", "macro_f1", "conformal", "in_distribution_rate"):
        if key in test:
            kept[key] = test[key]
    if calibration := test.get("calibration"):
        figures = {
            when: {key: calibration[when][key] for key in ("ece", "brier_score")} for when in ("before", "after")
        }
        kept["calibration"] = {"temperature": calibration["temperature"], **figures}
    if views := test.get("test_time_augmentation"):
        kept["with_views"] = views["accuracy"]
    return {
        "seed": config["recipe"]["seed"],
        "command": config["command"],
        "parameters": config["model"]["parameters"],
        "precision": config["recipe"]["precision"],
        "epochs": len(run.metrics),
        "seconds": run.metrics[-1]["seconds"],
        "machine": config["machine"],
        **kept,
    }


def read_records() -> dict[str, list[Record]]:
    """Return the records, by the name of their row."""
    return dict(json.loads(RECORDS.read_text(encoding="utf-8"))) if RECORDS.exists() else {}


def seconds(runs: list[Record]) -> list[float]:
    """Return the training seconds of runs."""
    return [float(run["seconds"] or 0) for run in runs]


def round_seconds(value: float) -> str:
    """Return seconds with as many digits as they are worth."""
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def mean_and_spread(shares: list[float]) -> str:
    """Return mean +- sd in per cent; without a spread if there is one."""
    values = [100 * share for share in shares]
    return f"{statistics.mean(values):.2f}%" + (f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def augmented(runs: list[Record]) -> str:
    """Return mean +- sd of the accuracies with test-time augmentation; nothing where it was not asked for."""
    accuracies = [run["with_views"] for run in runs if "with_views" in run]
    return mean_and_spread(accuracies) if accuracies else ""


def keep_line(row: Row, before: str) -> list[str]:
    """Return the line that a row has in the table ``before``, if it has one: for a row without records."""
    return [line for line in before.splitlines() if line.startswith(f"| `{row.arguments}` |")]


def table(rows: list[Row], before: str) -> str:
    """Return the Markdown table of some rows; one without records keeps its line of the table ``before``."""
    lines = [
        "| command: `convlens train` | data | seeds | test accuracy, mean +- sd | worst, best | 95% CI of seed 0 "
        "| parameters | epochs | training seconds, fastest and median | precision | with test-time augmentation |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    records = read_records()
    for row in rows:
        if not (runs := records.get(row.name)):
            lines += keep_line(row, before)
            continue
        accuracies = [run["accuracy"] for run in runs]
        first, (low, high) = runs[0], runs[0]["accuracy_ci95"]
        worst, best = (f"{100 * pick(accuracies):.2f}" for pick in (min, max))
        fastest, median = (round_seconds(pick(seconds(runs))) for pick in (min, statistics.median))
        lines.append(
            f"| `{row.arguments}` | {row.data} | {len(runs)} | {mean_and_spread(accuracies)} "
            f"| {worst}, {best} | {low:.2%} to {high:.2%} (n = {first['num_images']:,}) "
            f"| {first['parameters']:,} | {first['epochs']} | {fastest}, {median} "
            f"| {first['precision']} | {augmented(runs)} |"
        )
    return "\n".join(lines)


def calibration(before: str) -> str:
    """Return the table of calibration and coverage: the mean over the seeds of each row."""
    lines = [
        "| command: `convlens train` | seeds | temperature | ECE before, after "
        "| Brier score before, after | coverage: target, empirical | mean set size | test images reported unknown |",
        "|---|---|---|---|---|---|---|---|",
    ]
    records = read_records()
    for row in STRONG:
        runs = [run for run in records.get(row.name, []) if "calibration" in run]
        if not runs:
            lines += keep_line(row, before)
            continue

        def mean(*path: str, runs: list[Record] = runs) -> float:
            values: list[Any] = runs
            for key in path:
                values = [value[key] for value in values]
            return statistics.mean(values)

        error, brier = (
            [mean("calibration", when, key) for when in ("before", "after")] for key in ("ece", "brier_score")
        )
        lines.append(
            f"| `{row.arguments}` | {len(runs)} | {mean('calibration', 'temperature'):.2f} "
            f"| {error[0]:.2%}, {error[1]:.2%} | {brier[0]:.4f}, {brier[1]:.4f} "
            f"| {mean('conformal', 'target_coverage'):.0%}, {mean('conformal', 'empirical_coverage'):.1%} "
            f"| {mean('conformal', 'mean_set_size'):.2f} | {1 - mean('in_distribution_rate'):.1%} |"
        )
    return "\n".join(lines)


def headline(results: str) -> str:
    """Return README's short table: each strong default beside the classic program on the same data."""
    lines = [
        "| data | what convlens trains by default | a classic tutorial's model and settings, trained by convlens |",
        "|---|---|---|",
    ]
    classic = {row.data: row for row in reversed(CLASSICS)}
    for row in STRONG:
        beside = f"`{classic[row.data].name}`: {short(classic[row.data], results)}" if row.data in classic else ""
        lines.append(f"| {row.data} | **{short(row, results)}** | {beside} |")
    return "\n".join(lines)


def short(row: Row, results: str) -> str:
    """Return accuracy and seconds of a row of docs/results/accuracy.md in a few words."""
    line = next(line for line in results.splitlines() if line.startswith(f"| `{row.arguments}` |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return f"{cells[3]} (n = {cells[2]}), {cells[8].split(', ')[1]} s"


def write_tables() -> None:
    """Put the tables between their marks in docs/results/accuracy.md and README.md."""
    for mark, rows in (("strong", STRONG), ("fast", FAST), ("best", BEST), ("classics", CLASSICS)):
        put(RESULTS, mark, lambda before, rows=rows: table(rows, before))
    put(RESULTS, "calibration", calibration)
    put(README, "headline", lambda _: headline(RESULTS.read_text(encoding="utf-8")))


def write_docstrings() -> None:
    """Say in each recipe's docstring what came of its command."""
    text, records = RECIPES.read_text(encoding="utf-8"), read_records()
    for row in ROWS:
        if not (runs := records.get(row.name)):
            continue
        told = f"test accuracy {mean_and_spread([run['accuracy'] for run in runs])}"
        told += f" ({len(runs)} seed{'s' * (len(runs) > 1)})"
        command, median = f"`convlens train {row.arguments}`", round_seconds(statistics.median(seconds(runs)))
        beside = f"; with test-time augmentation {augmented(runs)}" if augmented(runs) else ""
        paragraph = rf"    {re.escape(command)}: test accuracy [^\n]*\n    {MACHINE}[^\n]*\n"
        text = re.sub(paragraph, f"    {command}: {told}, {median} s\n    {MACHINE}{beside}.\n", text)
    RECIPES.write_text(text, encoding="utf-8")


def ship() -> None:
    """Copy the bundles of seed 0 into the package, under the data's full name."""
    from convlens.export.onnx import add_graph, build_onnx
    from convlens.inference.bundle import load_bundle

    titles = {row.name: row.data for row in ROWS}
    for name, row in SHIPPED.items():
        bundle = load_bundle(RUNS / f"{row}-s0" / "model")
        data = {**bundle.training["data"], "name": titles[row]}
        dataclasses.replace(bundle, training={**bundle.training, "data": data}).save(WEIGHTS / name)
        add_graph(build_onnx(WEIGHTS / name), WEIGHTS / name)


if __name__ == "__main__":
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb == "runs":
        run_missing(sys.argv[2:])
    elif verb == "table":
        collect()
        write_tables()
        write_docstrings()
    elif verb == "ship":
        ship()
    else:
        sys.exit(__doc__)
