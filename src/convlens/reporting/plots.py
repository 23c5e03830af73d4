"""The pictures of a run: samples, curves, confusion matrix, worst mistakes, filters. Each writes one PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from convlens.runfolder import replacing

INK, QUIET, GRID = "#1f2933", "#66727f", "#e4e7eb"
TRAIN, VALIDATION, TEST, WRONG = "#2563eb", "#d97706", "#7c3aed", "#b91c1c"
COLUMNS = 10


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches. No global state: plots can be drawn in any thread."""
    figure = Figure(figsize=(width, height), dpi=144, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    with replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())


def title(figure: Figure, text: str) -> None:
    """Put a title above a figure, at its left."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)


def quiet_axes(axes: Axes) -> None:
    """Take away what does not help to read."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=QUIET, labelsize=8, length=0)


def show_image(axes: Axes, image: NDArray[Any]) -> None:
    """Show one uint8 image (C, H, W), grey or RGB, with its pixels as they are."""
    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_axis_off()


def shorten(text: str, length: int) -> str:
    """Cut ``text`` to ``length`` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def pick_samples(labels: Tensor, classes: int, count: int = 40) -> Tensor:
    """Return the rows of about ``count`` images, the classes in turn: the first of each, the second, ..."""
    each = max(math.ceil(count / classes), 1)
    rows = [(labels == label).nonzero().squeeze(1)[:each] for label in range(classes)]
    return torch.cat([row[i : i + 1] for i in range(each) for row in rows])[:count]


def draw_images(path: Path, images: Tensor, captions: Sequence[str], heading: str) -> None:
    """Draw a grid of uint8 images (N, C, H, W), each with its caption."""
    rows = max(math.ceil(len(images) / COLUMNS), 1)
    figure = new_figure(COLUMNS * 0.9, rows * 1.08 + 0.4)
    title(figure, heading)
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, caption in zip(grid.flat, images.cpu().numpy(), captions, strict=False):
        show_image(axes, image)
        axes.set_title(shorten(caption, 12), fontsize=8, color=INK, pad=3, parse_math=False)
    save(figure, path)


def draw_curves(path: Path, records: Sequence[dict[str, float | None]]) -> None:
    """Draw the four curves, loss and accuracy of training and of what was measured beside it, over epochs."""
    figure = new_figure(9, 3.4)
    title(figure, "How it learned")
    series = [
        ("train", "training", TRAIN),
        ("val", "validation", VALIDATION),
        ("test", "test (only watched)", TEST),
    ]
    for axes, kind, name in zip(figure.subplots(1, 2), ("loss", "acc"), ("loss", "accuracy"), strict=True):
        quiet_axes(axes)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        for prefix, label, colour in series:
            points = [(r["epoch"], value) for r in records if (value := r.get(f"{prefix}_{kind}")) is not None]
            if points:
                marker = "o" if len(points) < 30 else ""
                axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker, ms=3.5, lw=1.6)
        axes.set_title(name, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("epoch", fontsize=8, color=QUIET)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if kind == "acc":
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%" if value <= 1 else "")
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    save(figure, path)


def draw_confusion(path: Path, matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> None:
    """Draw the confusion matrix: rows are the true classes, columns the predictions, colour the share of the row."""
    counts = np.asarray(matrix, dtype=np.float64)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    k = len(classes)
    side = min(max(0.46 * k + 1.6, 3.2), 14)
    figure = new_figure(side + 0.6, side)
    title(figure, "What it takes for what")
    axes = figure.subplots()
    # a square-root scale: single mistakes stay visible beside thousands of hits
    axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)
    if k <= 30:
        for i, j in np.ndindex(k, k):
            if counts[i, j]:
                colour = "white" if share[i, j] > 0.15 else WRONG if i != j else INK
                axes.text(j, i, f"{int(counts[i, j])}", ha="center", va="center", fontsize=7, color=colour)
    names = [shorten(name, 14) for name in classes]
    size = 8 if k <= 30 else 5
    axes.set_xticks(range(k), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=size, parse_math=False)
    axes.set_yticks(range(k), names, fontsize=size, parse_math=False)
    axes.tick_params(length=0, colors=INK)
    axes.set_xlabel("prediction", fontsize=9, color=QUIET)
    axes.set_ylabel("true class", fontsize=9, color=QUIET)
    axes.spines[:].set_visible(False)
    save(figure, path)


def draw_mistakes(
    path: Path, images: Tensor, labels: Tensor, probabilities: Tensor, classes: Sequence[str], count: int = 30
) -> None:
    """Draw the wrong answers that the net was surest of: uint8 images (N, C, H, W), probabilities (N, K)."""
    values, guesses = probabilities.max(dim=1)
    wrong = (guesses != labels).nonzero().squeeze(1)
    wrong = wrong[values[wrong].argsort(descending=True)][:count]
    columns = 6
    rows = max(math.ceil(len(wrong) / columns), 1)
    figure = new_figure(9, rows * (9 / columns + 0.3) + 0.4)
    title(
        figure,
        "Worst mistakes: the wrong answers it was surest of" if len(wrong) else "No mistake on the test split",
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, row in zip(grid.flat, wrong.tolist(), strict=False):
        show_image(axes, images[row].cpu().numpy())
        truth, guess = shorten(classes[int(labels[row])], 11), shorten(classes[int(guesses[row])], 11)
        axes.set_title(f"{guess} {values[row]:.0%}\nis {truth}", fontsize=9, color=INK, pad=3, parse_math=False)
    save(figure, path)


def draw_filters(path: Path, weight: Tensor, count: int = 64) -> None:
    """Draw the kernels of the first convolution, (C', C, k, k): in colour for three channels, else channel 0."""
    kernels = weight[:count].numpy()
    columns = 8
    rows = math.ceil(len(kernels) / columns)
    figure = new_figure(9, rows * 1.1 + 0.5)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr,call-arg]
    title(
        figure,
        f"The {len(weight)} filters of the first convolution" + (f" ({count} shown)" if len(weight) > count else ""),
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, kernel in zip(grid.flat, kernels, strict=False):
        reach = max(float(np.abs(kernel).max()), 1e-9)
        if kernel.shape[0] == 3:
            axes.imshow((kernel / reach / 2 + 0.5).transpose(1, 2, 0), interpolation="nearest")
        else:
            axes.imshow(kernel[0], cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
    save(figure, path)
