"""The pictures of a run: samples, curves, confusion matrix, worst mistakes, filters. Each writes one PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from convlens.runfolder import replacing

INK, QUIET, GRID = "#1f2933", "#66727f", "#e4e7eb"
TRAIN, VALIDATION, TEST, WRONG = "#2563eb", "#d97706", "#7c3aed", "#b91c1c"
COLUMNS = 10
DPI = 144


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches. No global state: plots can be drawn in any thread."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
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


def draw_grid(
    path: Path, pictures: Sequence[NDArray[Any]], captions: Sequence[str], heading: str, *, columns: int, lines: int
) -> None:
    """Draw pictures, uint8 (H, W) or (H, W, 3), in a grid, each below its caption of ``lines`` lines.

    They are laid onto one sheet first: to let matplotlib place them one by one takes most of the time of a page.
    """
    width, top, gap = 9.0, 0.42, 0.06  # inches
    cell, text = width / columns, 0.155 * lines + 0.04
    height = top + max(math.ceil(len(pictures) / columns), 1) * (cell + text)
    side = round((cell - gap) * DPI)
    sheet = Image.new("RGB", (round(width * DPI), round(height * DPI)), "white")
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(
        0.01, 1 - 0.2 / height, heading, fontsize=12, fontweight="bold", color=INK, va="center", parse_math=False
    )
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        left, below = column * cell + gap / 2, top + row * (cell + text) + text
        enlarged = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (round(left * DPI), round(below * DPI)))
        if captions:
            place = ((left + (cell - gap) / 2) / width, 1 - (below - 0.03) / height)
            figure.text(*place, captions[number], fontsize=8.5, color=INK, ha="center", parse_math=False)
    figure.figimage(np.asarray(sheet))
    save(figure, path)


def to_picture(image: Tensor | NDArray[np.uint8]) -> NDArray[Any]:
    """Return a uint8 image (C, H, W) as (H, W) or (H, W, 3)."""
    pixels = image.cpu().numpy() if isinstance(image, Tensor) else image
    return pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0)


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
    short = [shorten(caption, 12) for caption in captions]
    draw_grid(path, [to_picture(image) for image in images], short, heading, columns=COLUMNS, lines=1)


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
    said = [(classes[int(guesses[row])], float(values[row]), classes[int(labels[row])]) for row in wrong]
    heading = "Worst mistakes: the wrong answers it was surest of" if said else "No mistake on the test split"
    draw_sheet(path, images[wrong], said, heading)


def draw_sheet(path: Path, images: Tensor, said: Sequence[tuple[str, float, str]], heading: str) -> None:
    """Draw uint8 images (N, C, H, W), each below what was said of it: (prediction, its probability, true class)."""
    captions = [f"{shorten(guess, 11)} {share:.0%}\nis {shorten(truth, 11)}" for guess, share, truth in said]
    draw_grid(path, [to_picture(image) for image in images], captions, heading, columns=6, lines=2)


def draw_reliability(path: Path, calibration: dict[str, Any]) -> None:
    """Draw what the net's confidence says against how often it is right, before and after the temperature."""
    figure = new_figure(6.6, 5.9)
    title(figure, "How much its certainty is worth")
    axes = figure.subplots()
    quiet_axes(axes)
    axes.grid(color=GRID, linewidth=0.8)
    axes.plot([0, 1], [0, 1], color=QUIET, lw=1, ls=":", label="as it should be")
    for when, label, colour in (("before", "as trained", VALIDATION), ("after", "calibrated", TRAIN)):
        bins = [b for b in calibration[when]["bins"] if b["n"]]
        most = max((b["n"] for b in bins), default=1)
        x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
        axes.plot(x, y, color=colour, lw=1.4, label=f"{label}: off by {calibration[when]['calibration_error']:.2%}")
        axes.scatter(x, y, s=[12 + 90 * b["n"] / most for b in bins], color=colour, zorder=3)
    axes.set_xlim(0, 1.03)
    axes.set_ylim(0, 1.03)
    percent = lambda value, _: f"{100 * value:.0f}%"  # noqa: E731
    axes.xaxis.set_major_formatter(percent)
    axes.yaxis.set_major_formatter(percent)
    axes.set_xlabel("it says it is so sure", fontsize=8, color=QUIET)
    axes.set_ylabel("it is right so often", fontsize=8, color=QUIET)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    save(figure, path)


def draw_corruptions(path: Path, clean: float, figures: dict[str, list[float]]) -> None:
    """Draw the accuracy against severity, from 0, the clean images, one small chart for each corruption."""
    columns = 3
    rows = math.ceil(len(figures) / columns)
    figure = new_figure(9, 0.5 + 1.7 * rows)
    title(figure, "Accuracy on spoiled images, by severity")
    for axes, (kind, values) in zip(figure.subplots(rows, columns, sharey=True).flat, figures.items(), strict=False):
        quiet_axes(axes)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.plot(range(len(values) + 1), [clean, *values], color=TRAIN, marker="o", ms=3.5, lw=1.6)
        axes.set_title(kind, fontsize=10, color=INK, loc="left")
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, path)


def draw_range_test(
    path: Path, rates: Sequence[float], losses: Sequence[float], marks: Sequence[tuple[str, float]]
) -> None:
    """Draw the smoothed loss over a rising learning rate, and rates with their names, the suggested one first."""
    figure = new_figure(6.6, 3.6)
    title(figure, f"A learning rate to begin with: {marks[0][1]:.2g}")
    axes = figure.subplots()
    quiet_axes(axes)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.plot(rates, losses, color=TRAIN, lw=1.6)
    looks = ((VALIDATION, "-"), (INK, "--"), (QUIET, ":"), (QUIET, "-."))
    for (name, rate), (colour, line) in zip(marks, looks, strict=False):
        axes.axvline(rate, color=colour, lw=1.4, ls=line, label=f"{name}: {rate:.2g}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate, rising with every step", fontsize=8, color=QUIET)
    axes.set_ylabel("loss, smoothed", fontsize=8, color=QUIET)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    save(figure, path)


def colour_kernel(share: NDArray[np.float32]) -> NDArray[Any]:
    """Return a kernel (C, k, k) of -1..1 as a picture, uint8 (k, k, 3): three channels as colours, else channel 0."""
    level = share / 2 + 0.5
    picture = level.transpose(1, 2, 0) if len(level) == 3 else colormaps["RdBu_r"](level[0])[:, :, :3]
    shown: NDArray[np.uint8] = (picture * 255).round().astype(np.uint8)
    return shown


def draw_filters(path: Path, kernels: NDArray[np.float32], count: int = 64) -> None:
    """Draw the kernels of the first convolution, (C', C, k, k), each by itself; see :func:`colour_kernel`."""
    shown = f" ({count} shown)" if len(kernels) > count else ""
    pictures = []
    for kernel in kernels[:count]:
        pictures.append(colour_kernel(kernel / max(float(np.abs(kernel).max()), 1e-9)))
    heading = f"The {len(kernels)} filters of the first convolution{shown}"
    draw_grid(path, pictures, [], heading, columns=16, lines=0)
