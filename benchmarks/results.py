"""Run the experiments of docs/results.md that are not there yet, write its tables, and ship the models.

    python benchmarks/results.py runs        # train what is missing, one run after another (hours on two cores)
    python benchmarks/results.py table       # write what came of them into the tables and the recipes' docstrings
    python benchmarks/results.py ship        # copy the bundles of seed 0 into the package

Run it in a folder that has ``cifar10-jpeg/`` and ``hymenoptera/`` (real data sets in class folders), with
CONVLENS_DATA pointing at MNIST and Fashion-MNIST. Every run is one ``convlens train`` command; its figures are
read from the run's own files.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import subprocess
import sys
from pathlib import Path

from convlens.run import Run

RUNS = Path("runs/results")
RESULTS = Path(__file__).parent.parent / "docs" / "results.md"
RECIPES = Path(__file__).parent.parent / "src" / "convlens" / "training" / "recipes.py"
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
    Row("fashion-mnist", "Fashion-MNIST", "fashion-mnist", 2),
    Row("cifar10", JPEG_COPY, "cifar10-jpeg --recipe cifar10-90", 2),
    Row("folder", "hymenoptera photos", "hymenoptera", 5),
]
FAST = [
    Row("mnist-99", "MNIST", "mnist --recipe mnist-99", 10),
    Row("fashion-92", "Fashion-MNIST", "fashion-mnist --recipe fashion-92", 5),
    Row("cifar10-94", JPEG_COPY, "cifar10-jpeg --recipe cifar10-94", 1),
]
SHIPPED = {"digits": "digits", "mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar10": JPEG_COPY}


def run_missing(names: list[str]) -> None:
    """Train every run that is not finished, the quick ones first; ``names`` limits it to some rows."""
    for row in [*STRONG, *FAST, *CLASSICS]:
        if names and row.name not in names:
            continue
        for seed in range(row.seeds):
            folder = RUNS / f"{row.name}-s{seed}"
            if (folder / "test.json").exists():
                continue
            command = ["convlens", "train", *row.arguments.split(), "--seed", str(seed), "--out", str(folder)]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)


def finished(row: Row) -> list[Run]:
    """Return the finished runs of a row, by seed."""
    return [Run(folder) for folder in sorted(RUNS.glob(f"{row.name}-s[0-9]*")) if (folder / "test.json").exists()]


def seconds(runs: list[Run]) -> list[float]:
    """Return the training seconds of runs."""
    return [float(run.metrics[-1]["seconds"] or 0) for run in runs]


def round_seconds(value: float) -> str:
    """Return seconds with as many digits as they are worth."""
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def describe_seconds(runs: list[Run]) -> str:
    """Return the shortest training time, for whatever else the machine did made the others longer, and the median."""
    return f"{round_seconds(min(seconds(runs)))}, {round_seconds(statistics.median(seconds(runs)))}"


def augmented(runs: list[Run]) -> str:
    """Return the accuracy with test-time augmentation, where the recipe declares it."""
    values = [
        100 * run.test["test_time_augmentation"]["accuracy"] for run in runs if "test_time_augmentation" in run.test
    ]
    if not values:
        return ""
    return f"{statistics.mean(values):.2f}%" + (f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def table(rows: list[Row]) -> str:
    """Return the Markdown table of some rows."""
    lines = [
        "| command: `convlens train` | data | seeds | test accuracy, mean +- sd | worst, best | 95% interval of seed 0 "
        "| parameters | epochs | training seconds, fastest and median | arithmetic | with test-time augmentation |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        runs = finished(row)
        if not runs:
            continue
        accuracies = [100 * run.accuracy for run in runs]
        spread = f" +- {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
        low, high = runs[0].test["accuracy_interval"]
        config = runs[0].config
        lines.append(
            f"| `{row.arguments}` | {row.data} | {len(runs)} | {statistics.mean(accuracies):.2f}%{spread} "
            f"| {min(accuracies):.2f}, {max(accuracies):.2f} | {low:.2%} to {high:.2%} (n = {runs[0].test['n']:,}) "
            f"| {config['model']['parameters']:,} | {len(runs[0].metrics)} | {describe_seconds(runs)} "
            f"| {config['recipe']['precision']} | {augmented(runs)} |"
        )
    return "\n".join(lines)


def headline() -> str:
    """Return README's short table: each strong default beside the classic program on the same data."""
    lines = [
        "| data | what convlens trains by default | the classic tutorial program there |",
        "|---|---|---|",
    ]
    classic = {row.data: row for row in reversed(CLASSICS)}
    for row in STRONG:
        beside = f"`{classic[row.data].name}`: {short(classic[row.data])}" if row.data in classic else ""
        lines.append(f"| {row.data} | **{short(row)}** | {beside} |")
    return "\n".join(lines)


def short(row: Row) -> str:
    """Return accuracy and seconds of a row in a few words."""
    runs = finished(row)
    if not runs:
        return ""
    accuracies = [100 * run.accuracy for run in runs]
    spread = f" +- {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
    median = round_seconds(statistics.median(seconds(runs)))
    return f"{statistics.mean(accuracies):.2f}%{spread} (n = {len(runs)}), {median} s"


def write_tables() -> None:
    """Put the tables between their marks in docs/results.md and README.md."""
    for file, mark, content in (
        (RESULTS, "strong", table(STRONG)),
        (RESULTS, "fast", table(FAST)),
        (RESULTS, "classics", table(CLASSICS)),
        (README, "headline", headline()),
    ):
        start, end = f"<!-- {mark} -->\n", f"<!-- end {mark} -->"
        before, rest = file.read_text(encoding="utf-8").split(start)
        file.write_text(before + start + content + "\n" + end + rest.split(end, 1)[1], encoding="utf-8")


def write_docstrings() -> None:
    """Say in each recipe's docstring what came of its command."""
    text = RECIPES.read_text(encoding="utf-8")
    for row in [*STRONG, *FAST, *CLASSICS]:
        if not (runs := finished(row)):
            continue
        accuracies = [100 * run.accuracy for run in runs]
        spread = f" +- {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
        seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
        told = f"test accuracy {statistics.mean(accuracies):.2f}%{spread} ({seeds})"
        command, median = f"`convlens train {row.arguments}`", round_seconds(statistics.median(seconds(runs)))
        paragraph = rf"    {re.escape(command)}: test accuracy [^\n]*\n"
        text = re.sub(paragraph, f"    {command}: {told}, {median} s\n", text)
    RECIPES.write_text(text, encoding="utf-8")


def ship() -> None:
    """Copy the bundles of seed 0 into the package, under the data's full name."""
    from convlens.shipping.bundle import load_bundle

    for name, title in SHIPPED.items():
        bundle = load_bundle(RUNS / f"{name}-s0" / "model")
        data = {**bundle.trained["data"], "name": title}
        dataclasses.replace(bundle, trained={**bundle.trained, "data": data}).save(WEIGHTS / name)


if __name__ == "__main__":
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb == "runs":
        run_missing(sys.argv[2:])
    elif verb == "table":
        write_tables()
        write_docstrings()
    elif verb == "ship":
        ship()
    else:
        sys.exit(__doc__)
