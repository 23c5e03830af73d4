"""The time machine: one page with a slider over a training, and an animated picture of it."""

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
from convlens.reports.image_grid import MUTED, TEXT, colour_kernel, shorten, to_picture
from convlens.reports.plots import TRAIN, new_figure, quiet_axes, title
from convlens.system.files import atomic_write, write_text
from convlens.system.progress import track
from convlens.web.render import read_static, render

MOST = 32  # filters, and maps of a stage, on the page

MOST_POINTS = 16_384  # of a stage at a moment: large maps are shown of fewer channels

MOST_CLASSES = 30  # of a confusion matrix that can be read


def write_timelapse(path: Path, moments: Sequence[SnapshotView], pixels: Pixels, about: dict[str, Any]) -> None:
    """Write the page of a training.

    ``about`` has its ``name``, ``data``, ``net``, ``classes``, what the ``picture`` is, and the ``images`` asked.
    """
    last = moments[-1]
    # what is loudest at the end is followed from the start
    shown = {
        name: np.argsort(-maps.max(axis=(1, 2)), kind="stable")[: min(MOST, max(MOST_POINTS // maps[0].size, 4))]
        for name, maps in last.maps.items()
    }
    tops = {name: max(float(m.maps[name][rows].max()) for m in moments) for name, rows in shown.items()}
    heaviest = heaviest_weight(moments)
    model = {
        **about,
        "shape": list(pixels.shape),
        "pixels": pack(pixels),
        "kernels": [min(len(last.kernels), MOST), *last.kernels.shape[1:]],
        "stages": [
            {"name": name, "count": len(maps), "shown": [len(shown[name]), *maps.shape[1:]]}
            for name, maps in last.maps.items()
        ],
        "moments": [
            {
                "step": m.step,
                "epoch": round(m.epoch, 4),
                "accuracy": round(m.accuracy, 4),
                "probabilities": [round(float(p), 4) for p in m.probabilities],
                "confusion": None if m.confusion is None or len(m.confusion) > MOST_CLASSES else m.confusion.tolist(),
                "kernels": pack((m.kernels[:MOST] / heaviest + 1) * 127.5),
                "maps": [
                    pack(np.sqrt(m.maps[name][rows].clip(0) / max(tops[name], 1e-9)) * 255)
                    for name, rows in shown.items()
                ],
            }
            for m in moments
        ],
    }
    fill = {
        "TITLE": html.escape(f"How {about['name']} learned"),
        "STYLE": read_static("page.css") + read_static("timelapse.css"),
        "SCRIPT": read_static("paint.js") + read_static("timelapse.js"),
        "MODEL": json.dumps(model, separators=(",", ":")).replace("<", "\\u003c"),
    }
    write_text(path, render("timelapse.html", fill))


def heaviest_weight(moments: Sequence[SnapshotView]) -> float:
    """Return what counts as full colour in the filters: 99 of 100 weights are smaller."""
    return max(float(np.quantile(np.abs(m.kernels), 0.99)) for m in moments)


def pack(values: NDArray[Any]) -> str:
    """Return numbers of 0..255 as bytes in base64."""
    return base64.b64encode(values.round().clip(0, 255).astype(np.uint8).tobytes()).decode()


def write_animation(path: Path, moments: Sequence[SnapshotView], pixels: Pixels, about: dict[str, Any]) -> None:
    """Write an animated GIF of a training: filters, the verdict on the picture, the confusion matrix."""
    heaviest, shown = heaviest_weight(moments), np.sort(np.argsort(-moments[-1].probabilities, kind="stable")[:10])
    frames = [draw_moment(moment, pixels, about, heaviest, shown) for moment in track(moments, "drawing", len(moments))]
    content = io.BytesIO()
    durations = [250] * (len(frames) - 1) + [2500]
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getvalue())


def draw_moment(
    moment: SnapshotView, pixels: Pixels, about: dict[str, Any], heaviest: float, shown: NDArray[np.int64]
) -> Image.Image:
    """Return one frame of the animation, 864 x 360 pixels, with the probabilities of the classes ``shown``."""
    figure = new_figure(9, 3.75)
    figure.set_dpi(96)
    title(figure, f"Epoch {tell_epoch(moment.epoch)}: {moment.accuracy:.1%} of the {about['images']} right")
    picture, filters, verdict, matrix = figure.subplots(1, 4, width_ratios=[0.5, 1.1, 0.9, 1])
    picture.imshow(to_picture(pixels), cmap="gray", vmin=0, vmax=255)
    lines = textwrap.wrap(shorten(about["picture"], 29), 15)[:2]
    picture.set_title("\n".join(lines), fontsize=9, color=TEXT, loc="left", parse_math=False)
    picture.set_axis_off()
    filters.imshow(tile(moment.kernels[:MOST], heaviest))
    filters.set_title("first filters", fontsize=10, color=TEXT, loc="left")
    filters.set_axis_off()
    quiet_axes(verdict)
    verdict.barh(range(len(shown)), moment.probabilities[shown], color=TRAIN)
    names = [shorten(about["classes"][i], 10) for i in shown]
    verdict.set_yticks(range(len(shown)), names, fontsize=8, parse_math=False)
    verdict.invert_yaxis()
    verdict.set_xlim(0, 1)
    verdict.set_xticks([0, 1], ["0%", "100%"])
    verdict.set_title("its verdict", fontsize=10, color=TEXT, loc="left")
    if moment.confusion is None:
        matrix.set_axis_off()
        return to_image(figure)
    share = moment.confusion / np.maximum(moment.confusion.sum(axis=1, keepdims=True), 1)
    matrix.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)
    matrix.set_title("what it takes for what", fontsize=10, color=TEXT, loc="left")
    names = [shorten(name, 7) for name in about["classes"]] if len(share) <= 10 else []
    turned = 90 if max(map(len, names), default=0) > 2 else 0
    matrix.set_xticks(range(len(names)), names, rotation=turned, parse_math=False)
    matrix.set_yticks(range(len(names)), names, parse_math=False)
    matrix.tick_params(length=0, labelsize=6, colors=MUTED)
    matrix.spines[:].set_visible(False)
    return to_image(figure)


def to_image(figure: Figure) -> Image.Image:
    """Return a figure in 128 colours."""
    figure.canvas.draw()
    drawn = np.asarray(figure.canvas.buffer_rgba())[:, :, :3]  # type: ignore[attr-defined]
    return Image.fromarray(drawn).quantize(128, dither=Image.Dither.NONE)


def tile(kernels: NDArray[np.float32], heaviest: float) -> NDArray[Any]:
    """Return kernels (C', C, k, k) side by side in one picture (H, W, 3), as the report has them."""
    columns = max(int(np.ceil(np.sqrt(len(kernels)))), 1)
    side = kernels.shape[2] + 1
    rows = -(-len(kernels) // columns)
    picture = np.full((rows * side - 1, columns * side - 1, 3), 255, np.uint8)
    for number, kernel in enumerate((kernels / max(heaviest, 1e-9)).clip(-1, 1)):
        top, left = side * (number // columns), side * (number % columns)
        picture[top : top + side - 1, left : left + side - 1] = colour_kernel(kernel)
    return picture


def tell_epoch(epoch: float) -> str:
    """Return an epoch as people say it.

    >>> tell_epoch(3.0), tell_epoch(0.02), tell_epoch(0.0)
    ('3', '0.02', '0')
    """
    return f"{epoch:.2g}" if epoch < 1 else f"{epoch:.4g}"
