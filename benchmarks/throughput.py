"""How fast nets train: beside the machine's peak, a bare loop, a training nobody watches; and how the cost grows.

``growth`` runs this file once more for each row, with the numbers of images, pixels of a side, and classes.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import convlens
from benchmarks.harness import Record, answer, net_label, print_cost, spread, table, timed
from convlens.data.augment import hflip
from convlens.data.dataset import Dataset
from convlens.data.loading import load_dataset
from convlens.data.preprocess import Preprocess
from convlens.models import create_model, summarize
from convlens.runs.run import Run
from convlens.system.device import set_num_threads
from convlens.system.memory import retain_freed_memory
from convlens.training.build import make_loss, make_optimizer
from convlens.training.loop import fit
from convlens.training.precision import autocast
from convlens.training.recipe import Recipe
from convlens.training.recipes import get_recipe
from convlens.training.schedule import learning_rate

CPU = torch.device("cpu")


def peak(precision: str, size: int = 2048, repeats: int = 12) -> float:
    """Return the GFLOP/s of a square matrix product, the fastest of some: what this machine can do at most."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(size, size).to(kind), torch.randn(size, size).to(kind)
    return 2 * size**3 / min(timed(lambda: a @ b) for _ in range(repeats)) / 1e9


NETS = [  # net, options, image (C, H, W), batch
    ("tiny", {}, (1, 28, 28), 512),
    ("small", {}, (1, 28, 28), 256),
    ("mnist-4conv", {}, (1, 28, 28), 512),
    ("whitened", {"width": 32}, (3, 32, 32), 250),
    ("whitened", {"width": 64}, (3, 32, 32), 250),
    ("residual", {"width": 48}, (1, 28, 28), 250),
    ("fashion-2conv", {}, (1, 28, 28), 100),
    ("folder-cnn", {}, (3, 64, 64), 32),
    ("cifar-lenet", {}, (3, 32, 32), 32),
]


def arithmetic() -> tuple[list[Record], str]:
    """Images/s and GFLOP/s of training, per net, beside the peak of a matrix product measured in the same run."""
    retain_freed_memory()  # as fit() does
    records, rows = [], []
    for name, options, shape, batch in NETS:
        for precision in ("bf16", "fp32"):
            top = peak(precision)
            channels, height, width = shape
            net = create_model(name, channels=channels, image_height=height, image_width=width, classes=10, **options)
            flops = 3 * sum(layer.flops for layer in summarize(net, *shape))
            step = make_step(net, Recipe(epochs=1, precision=precision), shape, batch)
            seconds = [timed(step) for _ in range(12)][2:]  # warmed up
            pace = batch / statistics.median(seconds)
            share = flops * pace / 1e9 / top
            label = net_label(name, options)
            records.append(
                {"net": label, "precision": precision, "batch": batch, "seconds": seconds, "flops": flops, "peak": top}
            )
            rows.append(
                [f"`{label}`", precision, f"{flops / 1e6:,.0f}", f"{pace:,.0f}", f"{flops * pace / 1e9:,.0f}",
                 f"{top:,.0f}", f"{share:.0%}"]
            )  # fmt: skip
    head = ["model", "precision", "MFLOPs per image (forward and backward)", "images/s", "GFLOP/s",
            "GFLOP/s of a matrix product", "fraction"]  # fmt: skip
    return records, table(head, rows)


def make_step(net: torch.nn.Module, recipe: Recipe, shape: tuple[int, int, int], batch: int) -> Callable[[], object]:
    """Return one training step on random images."""
    net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    images = torch.randn(batch, *shape).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))
    optimizer, compute_loss = make_optimizer(net, recipe), make_loss(recipe, net)

    def step() -> None:
        with autocast(recipe.precision, CPU):
            logits = net(images)
        optimizer.zero_grad()
        compute_loss(logits.float(), labels).backward()
        optimizer.step(0.01)

    return step


def bare_loop(net: torch.nn.Module, dataset: Dataset, recipe: Recipe) -> None:
    """Train as fit() does, written out by hand, with nothing that is not arithmetic."""
    preprocess = Preprocess.fit(dataset.train.images, dataset.input_style)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) * 255 for v in (preprocess.mean, preprocess.std))
    images, labels = dataset.train.images, dataset.train.labels
    net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = make_optimizer(net, recipe)
    steps = len(labels) // recipe.batch_size
    total = recipe.total_steps(steps)
    first = torch.rand(len(labels)) < 0.5
    for step in range(total):
        epoch, index = divmod(step, steps)
        if index == 0:
            order = torch.randperm(len(labels))
        rows = order[index * recipe.batch_size : (index + 1) * recipe.batch_size]
        x = (images[rows].float() - mean) / std
        if recipe.hflip:
            x = hflip(x, first[rows] ^ bool(epoch % 2))
        with autocast(recipe.precision, CPU):
            logits = net(x.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(learning_rate(recipe, step, total, steps))


def overhead() -> tuple[list[Record], str]:
    """What fit() costs over a bare loop with the same net, images and steps: paired runs, in turn."""
    mnist = load_dataset("mnist")
    recipe = get_recipe("mnist-99").override(precision="bf16")
    records: list[Record] = []

    def fresh() -> torch.nn.Module:
        torch.manual_seed(0)
        return create_model(recipe.model, channels=1, image_height=28, image_width=28, classes=10)

    loops = {
        "bare": lambda net: bare_loop(net, mnist, recipe),
        "fit": lambda net: list(fit(net, mnist, recipe)),
    }
    for turn in range(62):
        pair = {}
        for name in sorted(loops, reverse=turn % 2 == 1):  # each is the first in every second pair
            pair[name] = timed(partial(loops[name], fresh()))
        records.append(pair)
    records = records[2:]  # warmed up
    ratios = [pair["fit"] / pair["bare"] for pair in records]
    rows = [
        ["bare loop", *spread([pair["bare"] for pair in records])],
        ["`fit()`", *spread([pair["fit"] for pair in records])],
        ["ratio, pair by pair", *spread(ratios, 3)],
    ]
    return records, table(["`mnist-99`, 112 steps", "median, s", "least, most"], rows)


def live() -> tuple[list[Record], str]:
    """Training seconds of `mnist-995` (3 epochs) with the live page open beside those without it, pair by pair."""
    seconds: dict[str, list[float]] = {"plain": [], "live": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(5):
            for kind in ("plain", "live") if number % 2 else ("live", "plain"):
                out = Path(folder) / f"{kind}-{number}"
                command = [sys.executable, "-m", "convlens", "train", "mnist", "--epochs", "3", "--out", str(out)]
                command += ["--live"] * (kind == "live")
                with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                    assert process.stdout
                    for line in process.stdout:
                        if line.startswith("live "):
                            page = subprocess.Popen([sys.executable, "-c", LOOKING, line.split()[1]])
                if kind == "live":
                    page.wait()
                seconds[kind].append(float(Run(out).metrics[-1]["seconds"] or 0))
    ratios = [a / b for a, b in zip(seconds["live"], seconds["plain"], strict=True)]
    rows = [["without the dashboard, s", *spread(seconds["plain"])],
            ["with `--live` and a browser that polls once a second, s", *spread(seconds["live"])],
            ["ratio, pair by pair", *spread(ratios, 3)]]  # fmt: skip
    return [seconds], table(["training of `mnist-995`, 3 epochs", "median", "fastest, slowest"], rows)


# asks for what the live page asks for, once a second, until nobody answers
LOOKING = """
import sys, time, urllib.request
try:
    while True:
        urllib.request.urlopen(sys.argv[1] + "runs.json").read()
        time.sleep(1)
except OSError:
    pass
"""


GROWTH = [  # images, side, classes
    (2_000, 28, 10), (8_000, 28, 10), (32_000, 28, 10),
    (2_000, 64, 10), (2_000, 128, 10),
    (8_000, 28, 100), (8_000, 28, 1000),
]  # fmt: skip


def grown(images: int, side: int, classes: int) -> None:
    """Train one epoch of the folder recipe on random images, and print its seconds and this process's peak memory."""
    set_num_threads()
    g = np.random.default_rng(0)
    x = g.integers(0, 256, (images, side, side), dtype=np.uint8)
    y = np.arange(images) % classes
    with tempfile.TemporaryDirectory() as folder:
        run = convlens.train((x, y), "folder", epochs=1, batch_size=256, out=Path(folder) / "run", precision="bf16")
        print_cost(run.metrics[-1]["seconds"])


def growth() -> tuple[list[Record], str]:
    """Training seconds and peak memory against the number of images, their size and the number of classes."""
    records, rows = [], []
    for images, side, classes in GROWTH:
        cost = answer(__name__, images, side, classes)
        record = {"images": images, "side": side, "classes": classes, **cost}
        records.append(record)
        rows.append([f"{images:,}", str(side), f"{classes:,}", f"{record['seconds']:.1f}", f"{record['mib']:,.0f}"])
    return records, table(["images", "side", "classes", "seconds per epoch", "peak memory, MiB"], rows)


if __name__ == "__main__":
    grown(*map(int, sys.argv[1:]))
