"""Sheets: small pictures in a grid, each with its caption, as a PNG and as part of a page."""

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

WIDTH = 1296  # of a sheet; all lengths are pixels

GAP = 9  # between pictures

TOP, HEADING_SIZE = 60, 24

LINE, CAPTION_SIZE = 22, 17

COARSE = 96  # pictures up to this size are shown with hard edges: their pixels are what is to be seen


@dataclass(frozen=True)
class ImageGrid:
    """Pictures, uint8 (H, W) or (H, W, 3), in rows of ``columns``, each with its caption, which may have lines."""

    heading: str
    pictures: Sequence[NDArray[Any]]
    captions: Sequence[str]  # one for each picture, or none at all
    columns: int

    @property
    def side(self) -> int:
        """Pixels that a picture may be high and wide."""
        return round(WIDTH / self.columns) - GAP

    def save(self, path: Path) -> None:
        """Write the sheet as PNG, atomically."""
        cell, side = WIDTH / self.columns, self.side
        text = LINE * max((caption.count("\n") + 1 for caption in self.captions), default=0) + GAP
        height = TOP + max(math.ceil(len(self.pictures) / self.columns), 1) * (cell + text)
        sheet = Image.new("RGB", (WIDTH, round(height)), "white")
        pen = ImageDraw.Draw(sheet)
        pen.text((GAP, TOP // 2), self.heading, TEXT, font("DejaVuSans-Bold", HEADING_SIZE), anchor="lm")
        for number, picture in enumerate(self.pictures):
            row, column = divmod(number, self.columns)
            left, below = column * cell + GAP / 2, TOP + row * (cell + text) + text
            # what is small keeps its pixels, enlarged
            shown = ImageOps.contain(shrink(picture, side), (side, side), Image.Resampling.NEAREST)
            sheet.paste(shown, (round(left) + (side - shown.width) // 2, round(below)))
            if self.captions:
                lines = self.captions[number].split("\n")
                for line, words in enumerate(reversed(lines)):
                    place = (left + side / 2, below - GAP / 2 - line * LINE)
                    pen.text(place, words, TEXT, font("DejaVuSans", CAPTION_SIZE), anchor="md")
        with atomic_write(path) as temporary:
            sheet.save(temporary, format="png")

    def to_html(self) -> str:
        """Return the sheet as HTML: text that can be read and wraps on any screen, light or dark."""
        captions = self.captions or [""] * len(self.pictures)
        words = max((len(caption) for caption in captions), default=0) > 4
        least = (140 if self.columns <= 4 else 84) if words else 44  # pixels of a picture; there may be fewer in a row
        cells = "".join(
            f'<figure><img{" class=coarse" if max(picture.shape) <= COARSE else ""} alt="" '
            f'src="data:image/png;base64,{encode(shrink(picture, self.side))}">'
            + (f"<figcaption>{'<br>'.join(map(escape, caption.split(chr(10))))}</figcaption>" if caption else "")
            + "</figure>"
            for picture, caption in zip(self.pictures, captions, strict=True)
        )
        form = f"--columns:{self.columns};--least:{least}px"
        return f'<h3>{escape(self.heading)}</h3><div class=cells style="{form}">{cells}</div>'


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Return a font that comes with matplotlib."""
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    # the other engine refuses some characters that names of classes have
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def shrink(picture: NDArray[Any], side: int) -> Image.Image:
    """Return a picture as an image at most ``side`` high and wide."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def encode(image: Image.Image) -> str:
    """Return an image as PNG in base64."""
    content = io.BytesIO()
    image.save(content, format="png")
    return base64.b64encode(content.getvalue()).decode()


def to_picture(image: Tensor | NDArray[np.uint8]) -> NDArray[Any]:
    """Return a uint8 image (C, H, W) as (H, W) or (H, W, 3)."""
    pixels = image.cpu().numpy() if isinstance(image, Tensor) else image
    return pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0)


def shorten(text: str, length: int) -> str:
    """Cut ``text`` to ``length`` characters; what cannot be drawn, such as a tab in a file's name, gets a sign instead.

    >>> shorten("a long name", 6), len(shorten("tab" + chr(9), 6))
    ('a lon…', 4)
    """
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return text if len(text) <= length else text[: length - 1] + "…"


def pick_samples(labels: Tensor, classes: int, count: int = 40) -> Tensor:
    """Return the rows of about ``count`` images, the classes in turn: the first of each, the second, ..."""
    each = max(math.ceil(count / classes), 1)
    rows = [rows[:each] for _, rows in rows_by_class(labels)]
    return torch.cat([row[i : i + 1] for i in range(each) for row in rows])[:count]


def image_grid(images: Tensor, captions: Sequence[str], heading: str) -> ImageGrid:
    """Return a sheet of uint8 images (N, C, H, W), each with its caption, which may have lines."""
    short = ["\n".join(shorten(line, 12) for line in caption.split("\n")) for caption in captions]
    return ImageGrid(heading, [to_picture(image) for image in images], short, columns=10)


def prediction_grid(images: Tensor, said: Sequence[tuple[str, float, str]], heading: str) -> ImageGrid:
    """Return a sheet of uint8 images (N, C, H, W) and what was said of each: (prediction, its probability, class)."""
    captions = [f"says {shorten(guess, 11)}\n{share:.0%} sure\nis {shorten(truth, 13)}" for guess, share, truth in said]
    return ImageGrid(heading, [to_picture(image) for image in images], captions, columns=6)


def misclassified_grid(
    images: Tensor, labels: Tensor, probabilities: Tensor, classes: Sequence[str], count: int = 30
) -> ImageGrid:
    """Return a sheet of the wrong answers that the net was surest of: images (N, C, H, W), probabilities (N, K)."""
    values, guesses = probabilities.max(dim=1)
    wrong = (guesses != labels).nonzero().squeeze(1)
    wrong = wrong[values[wrong].argsort(descending=True)][:count]
    said = [(classes[int(guesses[row])], float(values[row]), classes[int(labels[row])]) for row in wrong]
    heading = "Worst mistakes: the wrong answers it was surest of" if said else "No mistake on the test split"
    return prediction_grid(images[wrong], said, heading)


def colour_kernel(share: NDArray[np.float32]) -> NDArray[Any]:
    """Return a kernel (C, k, k) of -1..1 as a picture, uint8 (k, k, 3): three channels as colours, else channel 0."""
    level = share / 2 + 0.5
    picture = level.transpose(1, 2, 0) if len(level) == 3 else colormaps["RdBu_r"](level[0])[:, :, :3]
    shown: NDArray[np.uint8] = (picture * 255).round().astype(np.uint8)
    return shown


def kernel_grid(kernels: NDArray[np.float32], count: int = 64) -> ImageGrid:
    """Return a sheet of the kernels of the first convolution, (C', C, k, k), each by itself."""
    shown = f" ({count} shown)" if len(kernels) > count else ""
    pictures = [colour_kernel(kernel / max(float(np.abs(kernel).max()), 1e-9)) for kernel in kernels[:count]]
    return ImageGrid(f"The {len(kernels)} filters of the first convolution{shown}", pictures, (), columns=16)
