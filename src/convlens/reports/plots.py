"""The plots of a run: curves, confusion matrix, calibration. Each writes a PNG; those on pages return an SVG too."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from convlens.evaluation.metrics import MAX_DENSE_CLASSES, Cell, dense_confusion, wilson_interval
from convlens.reports.image_grid import MUTED, TEXT, shorten
from convlens.system.files import atomic_write

GRID = "#e4e7eb"

BACKGROUND = "#fffffe"  # white that is the page's own in its SVG; other white stays white

ON_LIGHT = "#102a43"  # words on what stays light in the dark

TRAIN, VALIDATION, TEST, WRONG = "#2563eb", "#d97706", "#7c3aed", "#b91c1c"

DPI = 144

MAX_DRAWN = 30  # classes of a confusion matrix with its counts


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches. No global state: plots can be drawn in any thread."""
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
    """Write a figure as PNG; return it as SVG in the colours of a page, light or dark."""
    save(figure, path)
    figure.set_layout_engine(None)  # it has its places; of any engine, even "none", all would be drawn once more
    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "convlens"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z]\w*_\d+"', "", svg)  # another figure on the page has the same
    for colour, name in ((TEXT, "ink"), (MUTED, "quiet"), (GRID, "line"), (BACKGROUND, "card")):
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def title(figure: Figure, text: str) -> None:
    """Put a title above a figure, at its left."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold", color=TEXT, parse_math=False)


def quiet_axes(axes: Axes) -> None:
    """Take away what does not help to read."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)


def draw_curves(path: Path, records: Sequence[dict[str, float | None]]) -> str:
    """Draw the four curves, loss and accuracy of training and of what was measured beside it, over epochs."""
    figure = new_figure(7.2, 3.2)
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
    """Draw the confusion matrix: rows are the true classes, columns the predictions, colour the share of the row.

    ``cells`` are those that are not 0. Of more than 100 classes, which nobody could read, only the 30 with the most
    errors are drawn.
    """
    heading, every, images = "What it takes for what", len(classes), Counter[str]()
    for true, _, count in cells:
        images[true] += count
    if every > MAX_DENSE_CLASSES:
        errors = Counter[str]()
        for true, predicted, count in cells:
            if true != predicted:
                errors[true] += count
                errors[predicted] += count
        chosen = set(sorted(classes, key=lambda name: -errors[name])[:MAX_DRAWN])
        classes = [name for name in classes if name in chosen]
        cells = [cell for cell in cells if cell[0] in chosen and cell[1] in chosen]
        heading += f": the {len(classes)} of {every:,} classes with the most errors"
    counts = dense_confusion(cells, classes).astype(np.float64)
    share = counts / np.maximum([[images[name]] for name in classes], 1)
    k = len(classes)
    side = min(max(0.46 * k + 1.6, 3.2), 14)
    figure = new_figure(side + 0.6, side)
    title(figure, heading)
    axes = figure.subplots()
    # a square-root scale: single mistakes stay visible beside thousands of hits
    axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)
    if k <= MAX_DRAWN:
        for i, j in np.ndindex(k, k):
            if counts[i, j]:
                colour = "white" if share[i, j] > 0.15 else WRONG if i != j else ON_LIGHT
                axes.text(j, i, f"{int(counts[i, j])}", ha="center", va="center", fontsize=7, color=colour)
    names = [shorten(name, 14) for name in classes]
    size = 8 if k <= MAX_DRAWN else 5
    axes.set_xticks(range(k), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=size, parse_math=False)
    axes.set_yticks(range(k), names, fontsize=size, parse_math=False)
    axes.tick_params(length=0, colors=TEXT)
    axes.set_xlabel("prediction", fontsize=9, color=MUTED)
    axes.set_ylabel("true class", fontsize=9, color=MUTED)
    axes.spines[:].set_visible(False)
    return save_for_page(figure, path)


def draw_reliability(path: Path, calibration: dict[str, Any]) -> str:
    """Draw how often the net is right against how sure it says it is, with 95% intervals, and how often it says so."""
    figure = new_figure(6.6, 6.6)
    title(figure, "How much its certainty is worth")
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    for one in (axes, counts):
        quiet_axes(one)
        one.grid(color=GRID, linewidth=0.8)
        one.set_axisbelow(True)
    axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=":", label="as it should be")
    series = [("before", "as trained", VALIDATION), ("after", "calibrated", TRAIN)]
    if calibration["temperature"] == 1:
        series = [("after", "as trained, nothing to correct", TRAIN)]
    for when, label, colour in series:
        every = calibration[when]["bins"]
        bins = [b for b in every if b["n"]]
        x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
        ends = [wilson_interval(round(b["accuracy"] * b["n"]), round(b["n"])) for b in bins]
        far = [[max(share - low, 0.0), max(high - share, 0.0)] for share, (low, high) in zip(y, ends, strict=True)]
        said = f"{label}: off by {calibration[when]['calibration_error']:.2%}"
        axes.errorbar(x, y, np.transpose(far), color=colour, fmt="o", ms=5, lw=1.4, capsize=2, label=said)
        counts.stairs([b["n"] for b in every], np.linspace(0, 1, len(every) + 1), color=colour, lw=1.4)
    axes.set_xlim(0, 1.03)
    axes.set_ylim(-0.02, 1.03)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.set_ylabel("it is right so often (95% intervals)", fontsize=8, color=MUTED)
    axes.legend(frameon=False, fontsize=8, labelcolor=TEXT, loc="upper left")
    counts.set_yscale("log")
    counts.set_ylim(bottom=0.7)
    counts.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "")
    counts.minorticks_off()
    counts.set_ylabel("images", fontsize=8, color=MUTED)
    counts.set_xlabel("it says it is so sure", fontsize=8, color=MUTED)
    return save_for_page(figure, path)


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
        axes.set_title(kind, fontsize=10, color=TEXT, loc="left")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("severity", fontsize=8, color=MUTED)
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
    looks = ((VALIDATION, "-"), (TEXT, "--"), (MUTED, ":"), (MUTED, "-."))
    for (name, rate), (colour, line) in zip(marks, looks, strict=False):
        axes.axvline(rate, color=colour, lw=1.4, ls=line, label=f"{name}: {rate:.2g}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate, rising with every step", fontsize=8, color=MUTED)
    axes.set_ylabel("loss, smoothed", fontsize=8, color=MUTED)
    axes.legend(frameon=False, fontsize=8, labelcolor=TEXT)
    save(figure, path)
