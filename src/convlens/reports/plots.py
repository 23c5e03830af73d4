"""The plots of a run. Each function writes a PNG file; those for pages also return an SVG."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from convlens.evaluation.calibration import CalibrationReport
from convlens.evaluation.metrics import MAX_DENSE_CLASSES, Cell, dense_confusion, wilson_interval
from convlens.reports.image_grid import MUTED, TEXT, shorten
from convlens.system.files import atomic_write

GRID = "#e4e7eb"

BACKGROUND = "#fffffe"  # becomes the background color of the page in SVGs; pure white stays white

ON_LIGHT = "#102a43"  # text on areas that stay light in dark mode

TRAIN, VALIDATION, TEST, ERROR = "#2563eb", "#d97706", "#7c3aed", "#b91c1c"

DPI = 144

MAX_ANNOTATED_CLASSES = 30  # of a confusion matrix with counts in its cells


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches. It has no global state, so any thread may draw."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getvalue())


def save_for_page(figure: Figure, path: Path) -> str:
    """Write a figure as PNG; return it as SVG in the colors of a page, light or dark."""
    save(figure, path)
    figure.set_layout_engine(None)  # the layout is final; an engine, even "none", would draw everything again
    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "convlens"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z]\w*_\d+"', "", svg)  # other figures on the page have the same ids
    for color, name in ((TEXT, "ink"), (MUTED, "quiet"), (GRID, "line"), (BACKGROUND, "card")):
        svg = svg.replace(color, f"var(--{name})")
    return svg


def title(figure: Figure, text: str) -> None:
    """Add a left-aligned title to a figure."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold", color=TEXT, parse_math=False)


def style_axes(axes: Axes) -> None:
    """Remove spines and ticks that carry no information."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)


def draw_curves(path: Path, records: Sequence[dict[str, float | None]]) -> str:
    """Draw loss and accuracy over the epochs, for training, validation and test."""
    figure = new_figure(7.2, 3.2)
    title(figure, "Learning curves")
    series = [
        ("train", "training", TRAIN),
        ("val", "validation", VALIDATION),
        ("test", "test (not used)", TEST),
    ]
    for axes, kind, name in zip(figure.subplots(1, 2), ("loss", "acc"), ("loss", "accuracy"), strict=True):
        style_axes(axes)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        for prefix, label, color in series:
            points = [(r["epoch"], value) for r in records if (value := r.get(f"{prefix}_{kind}")) is not None]
            if points:
                marker = "o" if len(points) < 30 else ""
                axes.plot(*zip(*points, strict=True), color=color, label=label, marker=marker, ms=3.5, lw=1.6)
        axes.set_title(name, fontsize=10, color=TEXT, loc="left")
        axes.set_xlabel("epoch", fontsize=8, color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(records) == 1:
            axes.set_xticks([records[0]["epoch"] or 1])
        if kind == "acc":
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%" if value <= 1 else "")
        axes.legend(frameon=False, fontsize=8, labelcolor=TEXT)
    return save_for_page(figure, path)


def draw_confusion(path: Path, cells: Sequence[Cell], classes: Sequence[str]) -> str:
    """Draw the confusion matrix: rows are true classes, columns are predictions, color is the fraction of the row.

    Args:
        path: The PNG file to write.
        cells: The non-zero cells.
        classes: The class names; of more than 100, only the 30 with the most errors are drawn.

    Returns:
        The plot as SVG.
    """
    heading, num_classes, images = "Confusion matrix", len(classes), Counter[str]()
    for true, _, count in cells:
        images[true] += count
    if num_classes > MAX_DENSE_CLASSES:
        errors = Counter[str]()
        for true, predicted, count in cells:
            if true != predicted:
                errors[true] += count
                errors[predicted] += count
        chosen = set(sorted(classes, key=lambda name: -errors[name])[:MAX_ANNOTATED_CLASSES])
        classes = [name for name in classes if name in chosen]
        cells = [cell for cell in cells if cell[0] in chosen and cell[1] in chosen]
        heading += f": the {len(classes)} of {num_classes:,} classes with the most errors"
    counts = dense_confusion(cells, classes).astype(np.float64)
    fraction = counts / np.maximum([[images[name]] for name in classes], 1)
    k = len(classes)
    side = min(max(0.46 * k + 1.6, 3.2), 14)
    figure = new_figure(side + 0.6, side)
    title(figure, heading)
    axes = figure.subplots()
    # square-root scale: single errors stay visible next to thousands of correct predictions
    axes.imshow(np.sqrt(fraction), cmap="Blues", vmin=0, vmax=1)
    if k <= MAX_ANNOTATED_CLASSES:
        for i, j in np.ndindex(k, k):
            if counts[i, j]:
                color = "white" if fraction[i, j] > 0.15 else ERROR if i != j else ON_LIGHT
                axes.text(j, i, f"{int(counts[i, j])}", ha="center", va="center", fontsize=7, color=color)
    names = [shorten(name, 14) for name in classes]
    size = 8 if k <= MAX_ANNOTATED_CLASSES else 5
    axes.set_xticks(range(k), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=size, parse_math=False)
    axes.set_yticks(range(k), names, fontsize=size, parse_math=False)
    axes.tick_params(length=0, colors=TEXT)
    axes.set_xlabel("predicted class", fontsize=9, color=MUTED)
    axes.set_ylabel("true class", fontsize=9, color=MUTED)
    axes.spines[:].set_visible(False)
    return save_for_page(figure, path)


def draw_reliability(path: Path, calibration: CalibrationReport) -> str:
    """Draw the reliability diagram: accuracy against confidence, with 95% intervals, and a histogram of confidence."""
    figure = new_figure(6.6, 6.6)
    title(figure, "Reliability diagram")
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    for part in (axes, counts):
        style_axes(part)
        part.grid(color=GRID, linewidth=0.8)
        part.set_axisbelow(True)
    axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=":", label="perfect calibration")
    series = [(calibration.before, "uncalibrated", VALIDATION), (calibration.after, "temperature-scaled", TRAIN)]
    if calibration.temperature == 1:
        series = [(calibration.after, "uncalibrated (no correction needed)", TRAIN)]
    for scores, label, color in series:
        bins = [b for b in scores.bins if b.count]
        x, y = [b.confidence for b in bins], [b.accuracy for b in bins]
        intervals = [wilson_interval(round(b.accuracy * b.count), b.count) for b in bins]
        errors = [[max(p - low, 0.0), max(high - p, 0.0)] for p, (low, high) in zip(y, intervals, strict=True)]
        name = f"{label}: ECE {scores.ece:.2%}"
        axes.errorbar(x, y, np.transpose(errors), color=color, fmt="o", ms=5, lw=1.4, capsize=2, label=name)
        edges = np.linspace(0, 1, len(scores.bins) + 1)
        counts.stairs([b.count for b in scores.bins], edges, color=color, lw=1.4)
    axes.set_xlim(0, 1.03)
    axes.set_ylim(-0.02, 1.03)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.set_ylabel("accuracy (95% intervals)", fontsize=8, color=MUTED)
    axes.legend(frameon=False, fontsize=8, labelcolor=TEXT, loc="upper left")
    counts.set_yscale("log")
    counts.set_ylim(bottom=0.7)
    counts.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "")
    counts.minorticks_off()
    counts.set_ylabel("images", fontsize=8, color=MUTED)
    counts.set_xlabel("confidence", fontsize=8, color=MUTED)
    return save_for_page(figure, path)


def draw_corruptions(path: Path, clean: float, accuracies: dict[str, list[float]]) -> None:
    """Draw accuracy against severity, one small chart for each corruption.

    Args:
        path: The PNG file to write.
        clean: Accuracy on clean images, drawn at severity 0.
        accuracies: Corruption -> accuracy at severities 1 to 5.
    """
    columns = 3
    rows = math.ceil(len(accuracies) / columns)
    figure = new_figure(9, 0.5 + 1.7 * rows)
    title(figure, "Accuracy on corrupted images, by severity")
    for axes, (kind, values) in zip(figure.subplots(rows, columns, sharey=True).flat, accuracies.items(), strict=False):
        style_axes(axes)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.plot(range(len(values) + 1), [clean, *values], color=TRAIN, marker="o", ms=3.5, lw=1.6)
        axes.set_title(kind, fontsize=10, color=TEXT, loc="left")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("severity", fontsize=8, color=MUTED)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, path)


def draw_range_test(
    path: Path, rates: Sequence[float], losses: Sequence[float], marks: Sequence[tuple[str, float]]
) -> None:
    """Draw the learning rate range test: the smoothed loss over a rising learning rate.

    Args:
        path: The PNG file to write.
        rates: Learning rates.
        losses: Smoothed losses.
        marks: Learning rates to mark, with their names; the suggested one first.
    """
    figure = new_figure(6.6, 3.6)
    title(figure, f"Suggested learning rate: {marks[0][1]:.2g}")
    axes = figure.subplots()
    style_axes(axes)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.plot(rates, losses, color=TRAIN, lw=1.6)
    styles = ((VALIDATION, "-"), (TEXT, "--"), (MUTED, ":"), (MUTED, "-."))
    for (name, rate), (color, line) in zip(marks, styles, strict=False):
        axes.axvline(rate, color=color, lw=1.4, ls=line, label=f"{name}: {rate:.2g}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", fontsize=8, color=MUTED)
    axes.set_ylabel("smoothed loss", fontsize=8, color=MUTED)
    axes.legend(frameon=False, fontsize=8, labelcolor=TEXT)
    save(figure, path)
