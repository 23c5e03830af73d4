"""The timelapse of a training: a page with a slider over the snapshots, and an animated GIF."""

from __future__ import annotations

import base64
import html
import io
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from convlens.data.images import Pixels
from convlens.explain.timelapse import SnapshotView
from convlens.reports.image_grid import MUTED, TEXT, color_kernel, shorten, to_hwc
from convlens.reports.plots import TRAIN, new_figure, style_axes, title
from convlens.system.files import atomic_write, write_text
from convlens.system.progress import track
from convlens.web.render import read_static, render

MAX_MAPS = 32  # filters, and feature maps of a stage, on the page

MAX_STAGE_VALUES = 16_384  # of a stage in one snapshot: large maps are shown for fewer channels

MIN_MAPS = 4  # of a stage, however large

MAX_CONFUSION_CLASSES = 30  # a larger confusion matrix is unreadable

MAX_BARS = 10  # classes in the animation


def write_timelapse(path: Path, views: Sequence[SnapshotView], pixels: Pixels, info: dict[str, Any]) -> None:
    """Write the page.

    Args:
        path: The HTML file to write.
        views: The snapshots, in order.
        pixels: The followed image, uint8 (C, H, W).
        info: ``name`` of the run, ``data``, ``model``, ``classes``, ``image`` (what the followed image is) and
            ``images`` (what the accuracy is measured on).
    """
    last = views[-1]
    # follow the channels that are the most active at the end
    channels = {
        name: np.argsort(-maps.max(axis=(1, 2)), kind="stable")[
            : min(MAX_MAPS, max(MAX_STAGE_VALUES // maps[0].size, MIN_MAPS))
        ]
        for name, maps in last.feature_maps.items()
    }
    peaks = {name: max(float(v.feature_maps[name][rows].max()) for v in views) for name, rows in channels.items()}
    scale = kernel_scale(views)
    model = {
        **info,
        "shape": list(pixels.shape),
        "pixels": pack(pixels),
        "kernels": [min(len(last.kernels), MAX_MAPS), *last.kernels.shape[1:]],
        "stages": [
            {"name": name, "count": len(maps), "shown": [len(channels[name]), *maps.shape[1:]]}
            for name, maps in last.feature_maps.items()
        ],
        "snapshots": [describe_snapshot(view, channels, peaks, scale) for view in views],
    }
    parts = {
        "TITLE": html.escape(f"Timelapse of {info['name']}"),
        "STYLE": read_static("playground.css") + read_static("timelapse.css"),
        "SCRIPT": read_static("canvas.js") + read_static("timelapse.js"),
        "MODEL": json.dumps(model, separators=(",", ":")).replace("<", "\\u003c"),
    }
    write_text(path, render("timelapse.html", parts))


def describe_snapshot(
    view: SnapshotView, channels: dict[str, NDArray[np.int64]], peaks: dict[str, float], scale: float
) -> dict[str, Any]:
    """Return one snapshot for the page.

    Args:
        view: The snapshot.
        channels: Stage -> channels to show.
        peaks: Stage -> largest activation in all snapshots.
        scale: The weight that is drawn in full color.
    """
    readable = view.confusion is not None and len(view.confusion) <= MAX_CONFUSION_CLASSES
    return {
        "step": view.step,
        "epoch": round(view.epoch, 4),
        "accuracy": round(view.accuracy, 4),
        "probabilities": [round(float(p), 4) for p in view.probabilities],
        "confusion": view.confusion.tolist() if view.confusion is not None and readable else None,
        "kernels": pack((view.kernels[:MAX_MAPS] / scale + 1) * 127.5),
        "maps": [
            pack(np.sqrt(view.feature_maps[name][rows].clip(0) / max(peaks[name], 1e-9)) * 255)
            for name, rows in channels.items()
        ],
    }


def kernel_scale(views: Sequence[SnapshotView]) -> float:
    """Return the weight that is drawn in full color: the 99th percentile of the absolute weights."""
    return max(float(np.quantile(np.abs(view.kernels), 0.99)) for view in views)


def pack(values: NDArray[Any]) -> str:
    """Return values 0..255 as bytes in base64."""
    return base64.b64encode(values.round().clip(0, 255).astype(np.uint8).tobytes()).decode()


def write_animation(path: Path, views: Sequence[SnapshotView], pixels: Pixels, info: dict[str, Any]) -> None:
    """Write an animated GIF with filters, probabilities and confusion matrix; arguments as in write_timelapse."""
    scale, shown = kernel_scale(views), np.sort(np.argsort(-views[-1].probabilities, kind="stable")[:MAX_BARS])
    frames = [draw_snapshot(view, pixels, info, scale, shown) for view in track(views, "drawing", len(views))]
    content = io.BytesIO()
    durations = [250] * (len(frames) - 1) + [2500]
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getvalue())


def draw_snapshot(
    view: SnapshotView, pixels: Pixels, info: dict[str, Any], scale: float, shown: NDArray[np.int64]
) -> Image.Image:
    """Return one frame of the animation, 864 x 360 pixels, with the probabilities of the classes ``shown``."""
    figure = new_figure(9, 3.75)
    figure.set_dpi(96)
    title(figure, f"Epoch {format_epoch(view.epoch)}: accuracy {view.accuracy:.1%} on {info['images']}")
    image, filters, bars, matrix = figure.subplots(1, 4, width_ratios=[0.5, 1.1, 0.9, 1])
    image.imshow(to_hwc(pixels), cmap="gray", vmin=0, vmax=255)
    lines = textwrap.wrap(shorten(info["image"], 29), 15)[:2]
    image.set_title("\n".join(lines), fontsize=9, color=TEXT, loc="left", parse_math=False)
    image.set_axis_off()
    filters.imshow(tile_kernels(view.kernels[:MAX_MAPS], scale))
    filters.set_title("first filters", fontsize=10, color=TEXT, loc="left")
    filters.set_axis_off()
    style_axes(bars)
    bars.barh(range(len(shown)), view.probabilities[shown], color=TRAIN)
    names = [shorten(info["classes"][i], 10) for i in shown]
    bars.set_yticks(range(len(shown)), names, fontsize=8, parse_math=False)
    bars.invert_yaxis()
    bars.set_xlim(0, 1)
    bars.set_xticks([0, 1], ["0%", "100%"])
    bars.set_title("prediction", fontsize=10, color=TEXT, loc="left")
    if view.confusion is None:
        matrix.set_axis_off()
        return to_image(figure)
    fraction = view.confusion / np.maximum(view.confusion.sum(axis=1, keepdims=True), 1)
    matrix.imshow(np.sqrt(fraction), cmap="Blues", vmin=0, vmax=1)
    matrix.set_title("confusion matrix", fontsize=10, color=TEXT, loc="left")
    names = [shorten(name, 7) for name in info["classes"]] if len(fraction) <= MAX_BARS else []
    rotation = 90 if max(map(len, names), default=0) > 2 else 0
    matrix.set_xticks(range(len(names)), names, rotation=rotation, parse_math=False)
    matrix.set_yticks(range(len(names)), names, parse_math=False)
    matrix.tick_params(length=0, labelsize=6, colors=MUTED)
    matrix.spines[:].set_visible(False)
    return to_image(figure)


def to_image(figure: Figure) -> Image.Image:
    """Return a figure as an image with a palette of 128 colors."""
    figure.canvas.draw()
    drawn = np.asarray(figure.canvas.buffer_rgba())[:, :, :3]  # type: ignore[attr-defined]
    return Image.fromarray(drawn).quantize(128, dither=Image.Dither.NONE)


def tile_kernels(kernels: NDArray[np.float32], scale: float) -> NDArray[Any]:
    """Return kernels (C', C, k, k) side by side in one image, uint8 (H, W, 3)."""
    columns = max(int(np.ceil(np.sqrt(len(kernels)))), 1)
    side = kernels.shape[2] + 1
    rows = -(-len(kernels) // columns)
    image = np.full((rows * side - 1, columns * side - 1, 3), 255, np.uint8)
    for number, kernel in enumerate((kernels / max(scale, 1e-9)).clip(-1, 1)):
        top, left = side * (number // columns), side * (number % columns)
        image[top : top + side - 1, left : left + side - 1] = color_kernel(kernel)
    return image


def format_epoch(epoch: float) -> str:
    """Return a number of epochs for people.

    >>> format_epoch(3.0), format_epoch(0.02), format_epoch(0.0)
    ('3', '0.02', '0')
    """
    return f"{epoch:.2g}" if epoch < 1 else f"{epoch:.4g}"
