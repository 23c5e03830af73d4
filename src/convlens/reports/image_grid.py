"""Grids of small images with captions, as PNG files and as HTML."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from convlens.data.dataset import rows_by_class
from convlens.system.files import atomic_write

TEXT, MUTED = "#1f2933", "#66727f"

WIDTH = 1296  # of a grid; all lengths are pixels

GAP = 9  # between images

TOP, HEADING_SIZE = 60, 24

LINE, CAPTION_SIZE = 22, 17

MAX_PIXELATED_SIDE = 96  # images up to this size are enlarged without smoothing, to show their pixels


@dataclass(frozen=True)
class ImageGrid:
    """Images in rows of ``columns``."""

    heading: str
    images: Sequence[NDArray[Any]]  # uint8 (H, W) or (H, W, 3) each
    captions: Sequence[str]  # one for each image, with one or more lines; or empty
    columns: int

    @property
    def side(self) -> int:
        """Maximum height and width of an image, in pixels."""
        return round(WIDTH / self.columns) - GAP

    def save(self, path: Path) -> None:
        """Write the grid as PNG, atomically."""
        cell, side = WIDTH / self.columns, self.side
        text = LINE * max((caption.count("\n") + 1 for caption in self.captions), default=0) + GAP
        height = TOP + max(math.ceil(len(self.images) / self.columns), 1) * (cell + text)
        canvas = Image.new("RGB", (WIDTH, round(height)), "white")
        pen = ImageDraw.Draw(canvas)
        pen.text((GAP, TOP // 2), self.heading, TEXT, font("DejaVuSans-Bold", HEADING_SIZE), anchor="lm")
        for number, image in enumerate(self.images):
            row, column = divmod(number, self.columns)
            left, below = column * cell + GAP / 2, TOP + row * (cell + text) + text
            # nearest neighbor keeps the pixels of small images visible
            shown = ImageOps.contain(thumbnail(image, side), (side, side), Image.Resampling.NEAREST)
            canvas.paste(shown, (round(left) + (side - shown.width) // 2, round(below)))
            if self.captions:
                lines = self.captions[number].split("\n")
                for line, text_line in enumerate(reversed(lines)):
                    position = (left + side / 2, below - GAP / 2 - line * LINE)
                    pen.text(position, text_line, TEXT, font("DejaVuSans", CAPTION_SIZE), anchor="md")
        with atomic_write(path) as temporary:
            canvas.save(temporary, format="png")

    def to_html(self) -> str:
        """Return the grid as HTML, with selectable captions and a layout for any screen, light or dark."""
        captions = self.captions or [""] * len(self.images)
        has_text = max((len(caption) for caption in captions), default=0) > 4
        min_width = (140 if self.columns <= 4 else 84) if has_text else 44  # on narrow screens a row has fewer images
        cells = "".join(
            f'<figure><img{" class=pixelated" if max(image.shape) <= MAX_PIXELATED_SIDE else ""} alt="" '
            f'src="data:image/png;base64,{encode_png(thumbnail(image, self.side))}">'
            + (f"<figcaption>{'<br>'.join(map(escape, caption.split(chr(10))))}</figcaption>" if caption else "")
            + "</figure>"
            for image, caption in zip(self.images, captions, strict=True)
        )
        style = f"--columns:{self.columns};--min-width:{min_width}px"
        return f'<h3>{escape(self.heading)}</h3><div class=cells style="{style}">{cells}</div>'


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Return a font that is part of matplotlib."""
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    # the other layout engine rejects some characters in class names
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def thumbnail(pixels: NDArray[Any], side: int) -> Image.Image:
    """Return pixels, uint8 (H, W) or (H, W, 3), as an image at most ``side`` high and wide."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def encode_png(image: Image.Image) -> str:
    """Return an image as a PNG file in base64."""
    content = io.BytesIO()
    image.save(content, format="png")
    return base64.b64encode(content.getvalue()).decode()


def to_hwc(image: Tensor | NDArray[np.uint8]) -> NDArray[Any]:
    """Return a uint8 image (C, H, W) as (H, W) or (H, W, 3)."""
    pixels = image.cpu().numpy() if isinstance(image, Tensor) else image
    return pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0)


def shorten(text: str, length: int) -> str:
    """Cut ``text`` to ``length`` characters, and replace unprintable ones, such as a tab in a file name.

    >>> shorten("a long name", 6), len(shorten("tab" + chr(9), 6))
    ('a lon…', 4)
    """
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return text if len(text) <= length else text[: length - 1] + "…"


def pick_samples(labels: Tensor, classes: int, count: int = 40) -> Tensor:
    """Return about ``count`` row indices, taking the classes in turn: the first image of each, the second, ..."""
    each = max(math.ceil(count / classes), 1)
    rows = [rows[:each] for _, rows in rows_by_class(labels)]
    return torch.cat([row[i : i + 1] for i in range(each) for row in rows])[:count]


def image_grid(images: Tensor, captions: Sequence[str], heading: str) -> ImageGrid:
    """Return a grid of uint8 images (N, C, H, W) with one caption each."""
    short = ["\n".join(shorten(line, 12) for line in caption.split("\n")) for caption in captions]
    return ImageGrid(heading, [to_hwc(image) for image in images], short, columns=10)


def prediction_grid(images: Tensor, predictions: Sequence[tuple[str, float, str]], heading: str) -> ImageGrid:
    """Return a grid of uint8 images (N, C, H, W) with predicted label, confidence and true label."""
    captions = [
        f"{shorten(guess, 14)}\n{confidence:.0%}\ntrue: {shorten(true, 10)}" for guess, confidence, true in predictions
    ]
    return ImageGrid(heading, [to_hwc(image) for image in images], captions, columns=6)


def misclassified_grid(
    images: Tensor, labels: Tensor, probabilities: Tensor, classes: Sequence[str], count: int = 30
) -> ImageGrid:
    """Return a grid of the misclassified images with the highest confidence.

    Args:
        images: uint8 (N, C, H, W).
        labels: True classes, int64 (N,).
        probabilities: (N, K).
        classes: The class names.
        count: Maximum number of images.
    """
    confidences, predicted = probabilities.max(dim=1)
    rows = (predicted != labels).nonzero().squeeze(1)
    rows = rows[confidences[rows].argsort(descending=True)][:count]
    predictions = [(classes[int(predicted[row])], float(confidences[row]), classes[int(labels[row])]) for row in rows]
    heading = "Most confident misclassifications" if predictions else "No misclassified test images"
    return prediction_grid(images[rows], predictions, heading)


def color_kernel(kernel: NDArray[np.float32]) -> NDArray[Any]:
    """Return a kernel (C, k, k) with values -1..1 as uint8 (k, k, 3): three channels as RGB, else channel 0."""
    level = kernel / 2 + 0.5
    colors = level.transpose(1, 2, 0) if len(level) == 3 else colormaps["RdBu_r"](level[0])[:, :, :3]
    pixels: NDArray[np.uint8] = (colors * 255).round().astype(np.uint8)
    return pixels


def kernel_grid(kernels: NDArray[np.float32], count: int = 64) -> ImageGrid:
    """Return a grid of kernels (C', C, k, k) of the first convolution, each scaled by itself."""
    shown = f" ({count} shown)" if len(kernels) > count else ""
    images = [color_kernel(kernel / max(float(np.abs(kernel).max()), 1e-9)) for kernel in kernels[:count]]
    return ImageGrid(f"The {len(kernels)} filters of the first convolution{shown}", images, (), columns=16)
