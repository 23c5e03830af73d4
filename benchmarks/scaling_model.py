"""What a training would cost on more machines than we have: the tables of docs/explanation/scaling.md.

    python -m benchmarks.scaling_model

A step on R processes takes as long as the arithmetic of one process's part of the batch, and then the exchange of the
gradients: a ring sends 2 (R - 1) / R of their bytes through each link, in 2 (R - 1) messages (Patarasuk, Yuan 2009).
What is measured and what is assumed is told on that page.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import put
from convlens.models import create_model, summarize

PAGE = Path(__file__).parent.parent / "docs" / "explanation" / "scaling.md"


@dataclass(frozen=True)
class Net:
    """What a training of a net on one image costs."""

    name: str
    flops: float  # forward and backward, an image
    parameters: float
    pixels: float  # bytes of an image in a shard

    @property
    def gradient_bytes(self) -> float:
        """Bytes that a process sends in an exchange: float32."""
        return 4 * self.parameters


@dataclass(frozen=True)
class Place:
    """Where it runs."""

    name: str
    flops: float  # a second and process, that a training reaches
    link: float  # bytes a second of the slowest link that a ring crosses
    delay: float  # seconds a message


def ours(name: str, shape: tuple[int, int, int], **options: int) -> Net:
    """Return the cost of one of our nets, from its layers."""
    channels, height, width = shape
    net = create_model(name, channels=channels, image_height=height, image_width=width, classes=10, **options)
    flops = 3 * sum(layer.flops for layer in summarize(net, *shape))
    label = " ".join([name, *(f"{key} {value}" for key, value in options.items())])
    return Net(label, flops, sum(p.numel() for p in net.parameters()), channels * height * width)


NETS = [
    ours("mnist-4conv", (1, 28, 28)),
    ours("whitened", (3, 32, 32), width=64),
    Net("ResNet-50, 224 px", 3 * 8.2e9, 25.6e6, 3 * 224 * 224),  # He et al. 2016: 4.1 G multiply-adds forward
]
CPU = Place("one CPU core, 10 Gbit/s Ethernet", 150e9, 1.0e9, 50e-6)
GPU = Place("a GPU of 989 TFLOP/s at 10%, 50 GB/s per process", 0.1 * 989e12, 50e9, 15e-6)
RANKS = (1, 8, 64, 256, 1000)
A_BATCH = {"mnist-4conv": 512, "whitened width 64": 1000, "ResNet-50, 224 px": 256}  # images a step of one process


def step_seconds(net: Net, place: Place, ranks: int, images: int) -> tuple[float, float]:
    """Return seconds of arithmetic and of exchange of a step in which each of ``ranks`` has ``images`` images."""
    arithmetic = images * net.flops / place.flops
    sent = 2 * (ranks - 1) / ranks * net.gradient_bytes / place.link
    return arithmetic, sent + 2 * (ranks - 1) * place.delay


def efficiency(net: Net, place: Place, ranks: int, images: int) -> float:
    """Return the share of a step that is arithmetic."""
    arithmetic, exchange = step_seconds(net, place, ranks, images)
    return arithmetic / (arithmetic + exchange)


def tables() -> dict[str, str]:
    """Return the tables of the page by name."""
    nets = ["| model | GFLOP per image | parameters | gradients, MB | image, kB |", "| --- | --- | --- | --- | --- |"]
    for net in NETS:
        nets.append(
            f"| {net.name} | {net.flops / 1e9:.2f} | {net.parameters / 1e6:.2f} M | {net.gradient_bytes / 1e6:.1f} | "
            f"{net.pixels / 1e3:.1f} |"
        )
    heads = " | ".join(f"R = {ranks:,}" for ranks in RANKS)
    weak = [f"| model | hardware | {heads} |", "| --- | --- |" + " --- |" * len(RANKS)]
    for net in NETS:
        for place in (CPU, GPU):
            cells = [f"{efficiency(net, place, ranks, A_BATCH[net.name]):.0%}" for ranks in RANKS]
            weak.append(f"| {net.name}, {A_BATCH[net.name]} images each | {place.name} | {' | '.join(cells)} |")
    head = "| R | images/s | hours per epoch of a billion | total reads, GB/s | communication, fraction of a step |"
    big = [head, "| --- " * 5 + "|"]
    net = NETS[-1]
    for ranks in (8, 64, 256, 1000):
        arithmetic, exchange = step_seconds(net, GPU, ranks, A_BATCH[net.name])
        pace = ranks * A_BATCH[net.name] / (arithmetic + exchange)
        big.append(
            f"| {ranks:,} | {pace:,.0f} | {1e9 / pace / 3600:,.1f} | {pace * net.pixels / 1e9:,.1f} | "
            f"{exchange / (arithmetic + exchange):.1%} |"
        )
    return {"nets": "\n".join(nets), "weak": "\n".join(weak), "billion": "\n".join(big)}


if __name__ == "__main__":
    for name, rows in tables().items():
        put(PAGE, name, lambda _, rows=rows: rows)
        print(f"{rows}\n")
