"""The figures of an explanation, and the page that shows them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from convlens.data.images import Pixels
from convlens.explain.activations import ReceptiveField
from convlens.explain.explanation import Explanation
from convlens.explain.occlusion import Heatmap
from convlens.reports.html import make_figures, write_page
from convlens.reports.image_grid import ImageGrid, kernel_grid, shorten, to_hwc

MAX_MAPS = 32  # feature maps of a stage in a figure

HEATMAP_SIDE = 256  # pixels of a heatmap's longer side

MIN_OCCLUSION_SCALE = 0.05  # weaker occlusion maps are not stretched to full color

RGB = NDArray[np.uint8]  # (H, W, 3)

FRAME_COLOR = (217, 119, 6)  # the second color of the plots


@dataclass(frozen=True)
class Panel:
    """One figure of an explanation: its file name, the images and a caption."""

    file: str
    grid: ImageGrid
    caption: str


def make_panels(e: Explanation) -> list[Panel]:
    """Return the figures of an explanation, the most important first."""
    panels = [heatmap_panel(e)]
    if e.nearest_training_images:
        panels.append(neighbors_panel(e))
    panels.append(receptive_fields_panel(e))
    for number, (name, maps) in enumerate(e.feature_maps.items(), start=1):
        panels.append(feature_maps_panel(re.sub(r"[^\w.-]+", "-", f"maps-{number}-{name}.png"), name, maps))
    return [*panels, pooling_panel(e)]


def heatmap_panel(e: Explanation) -> Panel:
    """Return the input, the occlusion map and the class activation maps."""
    occlusion = e.occlusion / max(float(np.abs(e.occlusion).max()), MIN_OCCLUSION_SCALE)
    drop = f"{100 * float(e.occlusion.max()):.0f} points" if e.occlusion.max() > 0.005 else "nothing"
    images = [to_hwc(e.pixels), overlay(e.pixels, occlusion, "PuOr_r")]
    images += [overlay(e.pixels, heatmap, "inferno") for heatmap in e.cams.values()]
    captions = ["input", f"occlusion: costs up to {drop}"]
    captions += [f"stage {shorten(name, 16)}" for name in e.cams]
    return Panel(
        "where.png",
        ImageGrid(f"Where the model looks for {shorten(e.label, 40)}", images, captions, columns=3),
        f"Occlusion map: covering an orange region lowers the probability of “{e.label}”, covering a violet one "
        "raises it. Class activation maps (HiResCAM): for each stage, the brighter a region, the more it supports "
        f"“{e.label}”; each map is scaled by itself. Early stages are precise in position but respond to simple "
        "patterns; late stages are specific to the class but coarse.",
    )


def neighbors_panel(e: Explanation) -> Panel:
    """Return the most similar training images."""
    neighbors = e.nearest_training_images
    images = [to_hwc(e.pixels), *(to_hwc(neighbor.image) for neighbor in neighbors)]
    captions = ["this image\n", *(f"{shorten(n.label, 11)}\n{n.similarity:.2f}" for n in neighbors)]
    return Panel(
        "alike.png",
        ImageGrid("Most similar training images", images, captions, columns=9),
        "The similarity is the cosine between the features, the spatial means of the last feature maps; 1.00 is the "
        "maximum.",
    )


def receptive_fields_panel(e: Explanation) -> Panel:
    """Return the receptive field of one unit of each stage."""
    images, captions = [], []
    for name, field in e.receptive_fields.items():
        height, width = field.size
        images.append(mark_receptive_field(e.pixels, field))
        captions.append(
            f"{shorten(name, 14)}: {height} high, {width} wide\nmap {field.channel}, row {field.y}, column {field.x}"
        )
    return Panel(
        "sees.png",
        ImageGrid("Receptive field of one unit of each stage", images, captions, columns=max(len(images), 4)),
        "The bright part is the receptive field of one unit, the most active one of the stage or the one you chose: "
        "the pixels that this value of a feature map depends on, as far as they are inside the image. Deeper units "
        "have larger receptive fields.",
    )


def feature_maps_panel(file: str, name: str, maps: NDArray[np.float32]) -> Panel:
    """Return the feature maps (C', H', W') of a stage, the most active first."""
    order = np.argsort(-maps.max(axis=(1, 2)), kind="stable")[:MAX_MAPS]
    peak = max(float(maps.max()), 1e-9)
    images = [colorize(np.sqrt(np.maximum(maps[channel], 0) / peak), "magma") for channel in order]
    count, height, width = maps.shape
    shown = f", the {MAX_MAPS} most active" if count > MAX_MAPS else ""
    return Panel(
        file,
        ImageGrid(
            f"Stage {name}: {count} maps of {width} × {height}{shown}",
            images,
            [str(channel) for channel in order],
            columns=16,
        ),
        f"The feature maps of stage {name}, one for each filter, bright where the filter responds, the most active "
        "first. The number is the channel, counted from 0, as in the option `--unit`.",
    )


def kernels_panel(kernels: NDArray[np.float32]) -> Panel:
    """Return the kernels of the first convolution, (C', C, k, k)."""
    if kernels.shape[1] == 3:
        colors = "Each is shown in the colors that it responds to."
    else:
        colors = "Red weights are positive, blue ones negative."
    caption = f"The kernels of the first convolution; each responds to one small pattern. {colors}"
    return Panel("kernels.png", kernel_grid(kernels), caption)


def pooling_panel(e: Explanation) -> Panel:
    """Return the most active map of the first convolution: original, max-pooled and average-pooled."""
    original = e.pooling_demo["original"]
    low, high = float(original.min()), max(float(original.max()), float(original.min()) + 1e-9)
    images = [colorize((values - low) / (high - low), "magma") for values in e.pooling_demo.values()]
    captions = [f"{kind}, {values.shape[1]} × {values.shape[0]}" for kind, values in e.pooling_demo.items()]
    return Panel(
        "pooling.png",
        ImageGrid("Max and average pooling in blocks of 2 × 2", images, captions, columns=4),
        "The most active map of the first convolution; black is its lowest value, which may be negative. Max pooling "
        "keeps the strongest response of each block; average pooling keeps its mean, and blurs.",
    )


def colorize(values: NDArray[Any], colormap: str) -> RGB:
    """Return values 0..1, (H, W), in the colors of a colormap."""
    colored: RGB = (colormaps[colormap](values)[:, :, :3] * 255).round().astype(np.uint8)
    return colored


def enlarge(pixels: Pixels) -> RGB:
    """Return an image, uint8 (C, H, W), in RGB, enlarged by an integer factor."""
    image: RGB = np.asarray(Image.fromarray(to_hwc(pixels)).convert("RGB"))
    factor = max(HEATMAP_SIDE // max(image.shape), 1)
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def overlay(pixels: Pixels, heatmap: Heatmap, colormap: str) -> RGB:
    """Return an image in grayscale with a heatmap (H, W) over it, 0..1, or -1..1 for the colormap "PuOr_r"."""
    gray = np.asarray(Image.fromarray(enlarge(pixels)).convert("L"), np.float64)[:, :, None] / 255
    size = (gray.shape[1], gray.shape[0])
    smooth = np.asarray(Image.fromarray(heatmap.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
    diverging = colormap == "PuOr_r"
    colors = colormaps[colormap]((smooth.clip(-1, 1) + 1) / 2 if diverging else smooth.clip(0, 1))[:, :, :3]
    opacity = np.abs(smooth).clip(0, 1)[:, :, None] ** 0.7 * 0.8 if diverging else 0.65
    return ((colors * opacity + gray * (1 - opacity)) * 255).round().clip(0, 255).astype(np.uint8)


def mark_receptive_field(pixels: Pixels, field: ReceptiveField) -> RGB:
    """Return an image with a frame around a receptive field and everything outside dimmed."""
    image = enlarge(pixels).astype(np.float64)
    factor = image.shape[0] // pixels.shape[1]
    top, left, bottom, right = (factor * edge for edge in (field.top, field.left, field.bottom, field.right))
    marked = image * 0.35 + 60
    thickness = min(max(len(image) // 64, 1), (bottom - top) // 4, (right - left) // 4)
    marked[top:bottom, left:right] = FRAME_COLOR
    inside = np.s_[top + thickness : max(bottom - thickness, top), left + thickness : max(right - thickness, left)]
    marked[inside] = image[inside]
    return marked.round().clip(0, 255).astype(np.uint8)


def write_explanations(file: Path, title: str, sections: Sequence[tuple[str, str, Sequence[Panel]]]) -> None:
    """Write one page of explanations.

    Args:
        file: The HTML file to write.
        title: The title of the page.
        sections: For each explanation a heading, the prediction in words, and the figures.
    """
    body = ""
    if len(sections) > 2:
        links = (f'<a href="#{number}">{escape(heading)}</a>' for number, (heading, _, _) in enumerate(sections))
        body += f"<p>{' &middot; '.join(links)}</p>"
    for number, (heading, prediction, panels) in enumerate(sections):
        drawn = {panel.file: panel.grid.to_html() for panel in panels}
        figures = make_figures(drawn, {panel.file: panel.caption for panel in panels})
        body += f"<h2 id={number}>{escape(heading)}</h2><p>{escape(prediction)}</p>{figures}"
    body += """\
<p class=quiet>Heatmaps show what a prediction depends on, not whether it is correct: a model can look at the right
region and still be wrong.</p>
"""
    write_page(file, title, body, narrow=True)
