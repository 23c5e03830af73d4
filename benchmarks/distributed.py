"""What many processes, shards, growing shards and a sweep cost.

``streams`` runs this file once more for each number of images, with --pack and --stream.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import convlens
from benchmarks.harness import Record, answer, net_label, print_cost, table, timed
from convlens.data.arrays import from_arrays
from convlens.data.dataset import Dataset, Split
from convlens.data.shards import write_shards

PAIRS = 3
NETS = [  # net, options of the recipe, image (C, H, W), batch, steps
    ("mnist-4conv", {}, (1, 28, 28), 512, 12),
    ("whitened", {"width": 30}, (3, 32, 32), 500, 16),
    ("small", {}, (1, 28, 28), 256, 200),
]
STREAMED = [  # net, options of the recipe, image (C, H, W), batch, steps
    ("whitened", {"width": 30}, (3, 32, 32), 500, 12),
    ("small", {}, (3, 32, 32), 256, 120),
    ("tiny", {}, (1, 28, 28), 512, 120),
]
GROWN = (10_000, 100_000, 1_000_000)  # images


def noise(images: int, shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """Return random images, uint8 (N, H, W, C), and labels of ten classes."""
    channels, height, width = shape
    pixels = np.random.default_rng(0).integers(0, 256, (images, height, width, channels), np.uint8)
    return pixels, np.arange(images) % 10


def train(data: Path, net: str, options: dict[str, Any], batch: int, steps: int, *arguments: str) -> float:
    """Run ``convlens train`` on ``data``; return images a second of its training."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--{name}={value}" for name, value in options.items()]
        command = ["convlens", "train", str(data), "--recipe", "digits", "--model", net, *flags]
        command += [f"--batch-size={batch}", f"--max-steps={steps}", "--rotation=0", "--scale=0", "--precision=auto"]
        command += ["--lr=0.001", "--out", f"{folder}/run", *arguments]
        subprocess.run(command, capture_output=True, check=True)
        with open(f"{folder}/run/metrics.csv", encoding="utf-8") as file:
            return batch * steps / float(list(csv.DictReader(file))[-1]["seconds"])


def ratio(first: list[float], second: list[float]) -> str:
    """Return the median of the ratios second / first of each pair, with the smallest and the largest."""
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def processes() -> tuple[list[Record], str]:
    """Images/s of one process with one thread, and of two that share every batch."""
    records, rows = [], []
    for net, options, shape, batch, steps in NETS:
        with tempfile.TemporaryDirectory() as folder:
            x, y = noise(batch * steps // 2, shape)
            np.savez(f"{folder}/noise.npz", x_train=x, y_train=y, x_test=x[:200], y_test=y[:200])
            paces: dict[str, list[float]] = {"1": [], "2": []}
            for _ in range(PAIRS):
                for count in paces:
                    flags = ["--threads=1", "--processes", count, "--val-fraction=0"]
                    paces[count].append(train(Path(folder) / "noise.npz", net, options, batch, steps, *flags))
        label = net_label(net, options)
        records.append({"net": label, "batch": batch, "images_per_second": paces})
        medians = [f"{statistics.median(paces[count]):,.0f}" for count in paces]
        rows.append([f"`{label}`", f"{batch}", *medians, ratio(paces["1"], paces["2"])])
    return records, table(["model", "batch", "one process, images/s", "two, images/s", "ratio"], rows)


def shards() -> tuple[list[Record], str]:
    """Images/s of training from memory and from shards, in pairs."""
    records, rows = [], []
    for net, options, shape, batch, steps in STREAMED:
        with tempfile.TemporaryDirectory() as folder:
            x, y = noise(batch * steps // 2, shape)
            place = Path(folder)
            np.savez(place / "noise.npz", x_train=x, y_train=y, x_test=x[:200], y_test=y[:200])
            dataset = from_arrays(x, y, x[:200], y[:200])
            write_shards(dataset.with_validation(0.02, 0), place / "shards")
            paces: dict[str, list[float]] = {"memory": [], "shards": []}
            for _ in range(PAIRS):
                for kind, source in (("memory", place / "noise.npz"), ("shards", place / "shards")):
                    paces[kind].append(train(source, net, options, batch, steps, "--val-fraction=0.02"))
        label = net_label(net, options)
        records.append({"net": label, "shape": shape, "batch": batch, "images_per_second": paces})
        medians = [f"{statistics.median(paces[kind]):,.0f}" for kind in paces]
        rows.append([f"`{label}`", f"{shape[1]} px", *medians, ratio(paces["memory"], paces["shards"])])
    return records, table(["model", "images", "from memory, images/s", "from shards, images/s", "ratio"], rows)


def make_noise_shards(images: int, folder: Path) -> None:
    """Pack so many random grey images of 28 pixels, and 2,000 to validate and test on."""
    (x, y), (few, labels) = noise(images, (1, 28, 28)), noise(2_000, (1, 28, 28))
    train, held_out = from_arrays(x, y, few, labels).train, from_arrays(few, labels, few, labels).train
    classes = tuple(map(str, range(10)))
    assert isinstance(train, Split)
    write_shards(
        Dataset(
            name="noise", classes=classes, train=train, test=held_out, validation=held_out, split_description="noise"
        ),
        folder,
    )


def stream(folder: str) -> None:
    """Train one epoch from shards, and print its seconds, and this process's peak memory."""
    with tempfile.TemporaryDirectory() as out:
        run = convlens.train(folder, "mnist-99", epochs=1, out=Path(out) / "run")
        print_cost(run.metrics[-1]["seconds"])


def streams() -> tuple[list[Record], str]:
    """Peak memory and pace of a training from shards, against the number of images."""
    records, rows = [], []
    for images in GROWN:
        with tempfile.TemporaryDirectory() as folder:
            packed = Path(folder) / "shards"
            subprocess.run([sys.executable, "-m", __name__, "--pack", str(images), str(packed)], check=True)
            size = sum(file.stat().st_size for file in packed.iterdir())
            record = {"images": images, "bytes": size, **answer(__name__, "--stream", packed)}
        records.append(record)
        rows.append(
            [f"{images:,}", f"{size / 2**20:,.0f}", f"{record['seconds']:.1f}", f"{images / record['seconds']:,.0f}",
             f"{record['mib']:,.0f}"]
        )  # fmt: skip
    return records, table(["images", "shards, MiB", "seconds per epoch", "images/s", "peak memory, MiB"], rows)


def sweep() -> tuple[list[Record], str]:
    """Seconds of fifty trials on the digits with two jobs, and how the trials fell to them."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["convlens", "sweep", "digits", "--trials", "50", "--jobs", "2", "--confirm-seeds", "0"]
        command += ["--param", "lr=1e-4..1e-1:log", "--param", "batch-size=64,128,256", "--param", "momentum=0..0.99"]
        command += ["--out", f"{folder}/sweep"]
        seconds = timed(partial(subprocess.run, command, capture_output=True, check=True))
        with open(f"{folder}/sweep/trials.csv", encoding="utf-8") as file:
            trials = list(csv.DictReader(file))
    states, workers = (Counter(trial[column] for trial in trials) for column in ("state", "worker"))
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    share = " and ".join(map(str, workers.values()))
    record = {"seconds": seconds, "states": states, "workers": list(workers.values())}
    head = ["trials", "seconds", "outcome", "trials per job"]
    return [record], table(head, [["50", f"{seconds:.0f}", told, share]])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--pack"]:
        make_noise_shards(int(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[1:2] == ["--stream"]:
        stream(sys.argv[2])
