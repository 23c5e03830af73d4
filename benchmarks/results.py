"""Run the experiments of docs/results.md that are not there yet, write its tables, and ship the models.

    python benchmarks/results.py runs        # train what is missing, one run after another (hours on two cores)
    python benchmarks/results.py table       # write the tables of docs/results.md from the run folders
    python benchmarks/results.py ship        # copy the bundles of seed 0 into the package

Run it in a folder that has ``cifar10-jpeg/`` and ``hymenoptera/`` (real data sets in class folders), with
CONVLENS_DATA pointing at MNIST and Fashion-MNIST. Every run is one ``convlens train`` command; its figures are
read from the run's own files.
"""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
from pathlib import Path

from convlens.run import Run

RUNS = Path("runs/results")
RESULTS = Path(__file__).parent.parent / "docs" / "results.md"
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
    Row("fashion-mnist", "Fashion-MNIST", "fashion-mnist", 5),
    Row("cifar10", JPEG_COPY, "cifar10-jpeg --recipe cifar10", 3),
    Row("folder", "hymenoptera photos", "hymenoptera", 5),
]
SHIPPED = {"digits": "digits", "mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar10": JPEG_COPY}


def run_missing(names: list[str]) -> None:
    """Train every run that is not finished, the quick ones first; ``names`` limits it to some rows."""
    for row in [*STRONG, *CLASSICS]:
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


def fastest(runs: list[Run]) -> float:
    """Return the shortest training time: whatever else the machine did made the others longer."""
    return min(float(run.metrics[-1]["seconds"] or 0) for run in runs)


def table(rows: list[Row]) -> str:
    """Return the Markdown table of some rows."""
    lines = [
        "| command: `convlens train` | data | seeds | test accuracy, mean +- sd | worst, best | 95% interval of seed 0 "
        "| parameters | epochs | training seconds, fastest | arithmetic |",
        "|---|---|---|---|---|---|---|---|---|---|",
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
            f"| {config['model']['parameters']:,} | {len(runs[0].metrics)} | {fastest(runs):.0f} "
            f"| {config['recipe']['precision']} |"
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
    return f"{statistics.mean(accuracies):.2f}%{spread} (n = {len(runs)}), {fastest(runs):,.0f} s"


def write_tables() -> None:
    """Put the tables between their marks in docs/results.md and README.md."""
    for file, mark, content in (
        (RESULTS, "strong", table(STRONG)),
        (RESULTS, "classics", table(CLASSICS)),
        (README, "headline", headline()),
    ):
        start, end = f"<!-- {mark} -->\n", f"<!-- end {mark} -->"
        before, rest = file.read_text(encoding="utf-8").split(start)
        file.write_text(before + start + content + "\n" + end + rest.split(end, 1)[1], encoding="utf-8")


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
    elif verb == "ship":
        ship()
    else:
        sys.exit(__doc__)
