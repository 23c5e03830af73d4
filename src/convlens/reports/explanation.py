"""The pictures of an explanation, as sheets, and the page that shows them."""

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
from convlens.explain.occlusion import Heat
from convlens.reports.html import make_pictures, write_page
from convlens.reports.image_grid import ImageGrid, kernel_grid, shorten, to_picture

MOST_MAPS = 32  # of a stage, on its picture

ENLARGED = 256  # pixels of a heat map's longer side

RGB = NDArray[np.uint8]  # (H, W, 3)

FRAME = (217, 119, 6)  # the second colour of the plots


@dataclass(frozen=True)
class Panel:
    """One picture of an explanation: its file, a sheet, and what it shows."""

    file: str
    sheet: ImageGrid
    text: str


def picture_explanation(e: Explanation) -> list[Panel]:
    """Return the pictures of an explanation, the first to look at first."""
    pictures = [picture_where(e), *([picture_alike(e)] if e.neighbours else []), picture_units(e)]
    for number, (name, maps) in enumerate(e.maps.items(), start=1):
        pictures.append(picture_maps(re.sub(r"[^\w.-]+", "-", f"maps-{number}-{name}.png"), name, maps))
    return [*pictures, picture_pooling(e)]


def picture_where(e: Explanation) -> Panel:
    """Return the image, and where the net looks for the class: both heat maps laid over it."""
    hangs = e.occlusion / max(float(np.abs(e.occlusion).max()), 0.05)  # nothing much is not made to look like much
    most = f"{100 * float(e.occlusion.max()):.0f} points" if e.occlusion.max() > 0.005 else "nothing"
    pictures = [to_picture(e.pixels), lay_over(e.pixels, hangs, "PuOr_r")]
    pictures += [lay_over(e.pixels, heat, "inferno") for heat in e.activations.values()]
    captions = ["what the net gets", f"covered: costs up to {most}"]
    captions += [f"stage {shorten(name, 16)}" for name in e.activations]
    return Panel(
        "where.png",
        ImageGrid(f"Where it looks for {shorten(e.label, 40)}", pictures, captions, columns=3),
        f"Orange: with a square over it, the picture has a smaller probability of “{e.label}”; violet: a larger one. "
        f"Then, for each stage, what on its maps speaks for “{e.label}” (class activation map, HiResCAM), the brighter "
        "the more, each map by itself. The first stages point more exactly; the last know best what they see, but only "
        "roughly where.",
    )


def picture_alike(e: Explanation) -> Panel:
    """Return the training images that the net finds most like the picture."""
    pictures = [to_picture(e.pixels), *(to_picture(one.image) for one in e.neighbours)]
    captions = ["this picture\n", *(f"{shorten(one.label, 11)}\n{one.similarity:.2f} alike" for one in e.neighbours)]
    return Panel(
        "alike.png",
        ImageGrid("Training images that look like it to the net", pictures, captions, columns=9),
        "Alike are images whose features, the means of the last maps, point the same way (cosine; 1.00 is the same).",
    )


def picture_units(e: Explanation) -> Panel:
    """Return what the loudest unit of each stage sees of the image."""
    pictures, captions = [], []
    for name, unit in e.units.items():
        height, width = unit.size
        pictures.append(mark_seen(e.pixels, unit))
        captions.append(
            f"{shorten(name, 14)}: {height} high, {width} wide\nmap {unit.channel}, row {unit.y}, column {unit.x}"
        )
    return Panel(
        "sees.png",
        ImageGrid("How far one unit of each stage sees", pictures, captions, columns=max(len(pictures), 4)),
        "The bright part is the receptive field of one unit of a stage, its loudest or the one that was asked for: all "
        "that this one number of a feature map can know of the picture, in pixels, as far as it lies inside. Deeper "
        "units see more.",
    )


def picture_maps(file: str, name: str, maps: NDArray[np.float32]) -> Panel:
    """Return the feature maps of a stage, the loudest first."""
    order = np.argsort(-maps.max(axis=(1, 2)), kind="stable")[:MOST_MAPS]
    top = max(float(maps.max()), 1e-9)
    pictures = [colorize(np.sqrt(np.maximum(maps[channel], 0) / top), "magma") for channel in order]
    count, height, width = maps.shape
    more = f", the {MOST_MAPS} loudest" if count > MOST_MAPS else ""
    heading = f"Stage {name}: {count} maps of {width} × {height}{more}"
    return Panel(
        file,
        ImageGrid(heading, pictures, [str(channel) for channel in order], columns=16),
        f"What stage {name} makes of the picture: one map a filter, bright where the filter found what it looks for, "
        "the loudest first. The number is that of the filter, counted from 0: the channel of --unit.",
    )


def picture_kernels(kernels: NDArray[np.float32]) -> Panel:
    """Return the kernels of the first convolution, (C', C, k, k)."""
    colours = (
        "Each is shown in the colours that it answers to." if kernels.shape[1] == 3 else "Red adds, blue takes away."
    )
    text = f"The kernels of the first convolution: each looks for one pattern, everywhere. {colours}"
    return Panel("kernels.png", kernel_grid(kernels), text)


def picture_pooling(e: Explanation) -> Panel:
    """Return the loudest map of the first convolution whole, pooled by the maximum and by the average."""
    whole = e.pooled["whole"]
    low, high = float(whole.min()), max(float(whole.max()), float(whole.min()) + 1e-9)
    pictures = [colorize((values - low) / (high - low), "magma") for values in e.pooled.values()]
    sizes = [f"{values.shape[1]} × {values.shape[0]}" for values in e.pooled.values()]
    captions = [f"{what}, {size}" for what, size in zip(("as it is", "maximum", "average"), sizes, strict=True)]
    return Panel(
        "pooling.png",
        ImageGrid("One map, pooled in blocks of 2 × 2", pictures, captions, columns=4),
        "The loudest map of the first convolution; black is its lowest value, which may be negative. The maximum keeps "
        "that something was found; the average keeps how much of it there was, and blurs.",
    )


def colorize(values: NDArray[Any], scale: str) -> RGB:
    """Return values of 0..1 (H, W) in the colours of a scale."""
    shown: RGB = (colormaps[scale](values)[:, :, :3] * 255).round().astype(np.uint8)
    return shown


def enlarge(pixels: Pixels) -> RGB:
    """Return an image, uint8 (C, H, W), in RGB and whole multiples of its size."""
    picture: RGB = np.asarray(Image.fromarray(to_picture(pixels)).convert("RGB"))
    times = max(ENLARGED // max(picture.shape), 1)
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def lay_over(pixels: Pixels, heat: Heat, scale: str) -> RGB:
    """Return an image in grey with a heat map (H, W) over it: 0..1, or -1..1 for a scale with two ends."""
    grey = np.asarray(Image.fromarray(enlarge(pixels)).convert("L"), np.float64)[:, :, None] / 255
    size = (grey.shape[1], grey.shape[0])
    smooth = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
    two_ended = scale == "PuOr_r"
    colours = colormaps[scale]((smooth.clip(-1, 1) + 1) / 2 if two_ended else smooth.clip(0, 1))[:, :, :3]
    strength = np.abs(smooth).clip(0, 1)[:, :, None] ** 0.7 * 0.8 if two_ended else 0.65
    return ((colours * strength + grey * (1 - strength)) * 255).round().clip(0, 255).astype(np.uint8)


def mark_seen(pixels: Pixels, unit: ReceptiveField) -> RGB:
    """Return an image with all but what a unit sees dimmed, and a frame around that."""
    shown = enlarge(pixels).astype(np.float64)
    times = shown.shape[0] // pixels.shape[1]
    top, left, bottom, right = (times * edge for edge in (unit.top, unit.left, unit.bottom, unit.right))
    marked = shown * 0.35 + 60
    edge = min(max(len(shown) // 64, 1), (bottom - top) // 4, (right - left) // 4)
    marked[top:bottom, left:right] = FRAME
    inside = np.s_[top + edge : max(bottom - edge, top), left + edge : max(right - edge, left)]
    marked[inside] = shown[inside]
    return marked.round().clip(0, 255).astype(np.uint8)


def write_explanations(file: Path, title: str, parts: Sequence[tuple[str, str, Sequence[Panel]]]) -> None:
    """Write one page of explanations: for each a heading, what was answered, and its pictures."""
    body = ""
    if len(parts) > 2:
        links = (f'<a href="#{number}">{escape(heading)}</a>' for number, (heading, _, _) in enumerate(parts))
        body += f"<p>{' &middot; '.join(links)}</p>"
    for number, (heading, answer, pictures) in enumerate(parts):
        drawn = {one.file: one.sheet.to_html() for one in pictures}
        shown = make_pictures(drawn, {one.file: one.text for one in pictures})
        body += f"<h2 id={number}>{escape(heading)}</h2><p>{escape(answer)}</p>{shown}"
    body += """\
<p class=quiet>Heat maps show what an answer hangs on, not whether it is right: a net can look at the right
place and be wrong.</p>
"""
    write_page(file, title, body, narrow=True)
