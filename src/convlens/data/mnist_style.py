"""Make an image of ink on paper look like MNIST: background removal, cropping, centering by mass."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convlens.data.images import MAX_BORDER_SAMPLES, MAX_INK_PIXELS, InputStyle


def fit_ink(image: Image.Image, height: int, width: int, style: InputStyle) -> Image.Image:
    """Make a grey picture of ink on paper (or light on dark) look as MNIST's makers made theirs.

    The background is taken from the border and becomes black, the ink is cropped, scaled into the style's box
    with its proportions kept, and centred by its mass or its bounding box (LeCun et al. 1998, section III.A).
    A picture that has the size and the black border already is left as it is. One of more than 4096 x 4096 pixels is
    first scaled down by a whole number.
    """
    if (count := image.width * image.height) > MAX_INK_PIXELS:
        image = image.reduce(math.ceil(math.sqrt(count / MAX_INK_PIXELS)))
    values = np.asarray(image, dtype=np.float32)  # (H, W), 0..255
    border = (values[0], values[-1], values[:, 0], values[:, -1])
    if values.shape == (height, width) and not any(side.any() for side in border):
        return image  # as it is, without the search for its paper
    paper = estimate_paper(values)
    brightness = float(np.median(paper))
    if values.shape == (height, width) and brightness < 64:
        return image
    # in place, for an image may be large
    ink = np.subtract(*((paper, values) if brightness > 127 else (values, paper)), out=values)
    del paper
    # not the single darkest pixel, which may be dust; nor a share of the page, for a digit on a whole sheet is small
    rank = min(ink.size // 40 + 1, 20)
    peak = float(np.partition(ink, -rank, axis=None)[-rank])
    if peak < 16:  # nothing stands out: an empty page
        return Image.new("L", (width, height))
    ink /= peak
    ink.clip(0, 1, out=ink)
    ink[ink < 0.25] = 0  # the grain of paper and the noise of a camera
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = style.content_size / max(ink.shape)
    size = (max(round(ink.shape[1] * scale), 1), max(round(ink.shape[0] * scale), 1))
    small = Image.fromarray((ink * 255).astype(np.uint8)).resize(size, Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float32)
    pixels = pixels * (255 / max(float(pixels.max()), 1.0))  # thin strokes grow pale when they shrink
    y, x = (pixels.shape[0] - 1) / 2, (pixels.shape[1] - 1) / 2
    if style.center_of_mass:
        total = pixels.sum()
        y = float((pixels.sum(axis=1) * np.arange(pixels.shape[0])).sum() / total)
        x = float((pixels.sum(axis=0) * np.arange(pixels.shape[1])).sum() / total)
    top = min(max(round((height - 1) / 2 - y), 0), height - pixels.shape[0])
    left = min(max(round((width - 1) / 2 - x), 0), width - pixels.shape[1])
    page = np.zeros((height, width), dtype=np.uint8)
    page[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels.astype(np.uint8)
    return Image.fromarray(page)


def estimate_paper(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the background (H, W) of a grey picture: the plane through its border, for a lamp shines from a side.

    Fitted twice by least squares, the second time without what stands out, such as ink that runs over the edge. Of a
    border of more than 65,536 pixels, every second (third, ...) is taken.
    """
    height, width = values.shape
    each = math.ceil(2 * (height + width) / MAX_BORDER_SAMPLES)
    y, x = np.arange(height, dtype=np.float32) / height, np.arange(width, dtype=np.float32) / width
    # the border, one row a pixel: brightness, y, x
    edges = [(values[0], 0 * x, x), (values[-1], 0 * x + y[-1], x), (values[:, 0], y, 0 * y)]
    edges.append((values[:, -1], y, 0 * y + x[-1]))
    seen, rows, columns = (np.concatenate([side[::each] for side in parts]) for parts in zip(*edges, strict=True))
    terms = np.stack([np.ones_like(seen), rows, columns], axis=1)
    kept = np.abs(seen - np.median(seen)) < 96
    for _ in range(2):
        plane, *_ = np.linalg.lstsq(terms[kept], seen[kept], rcond=None)
        distance = np.abs(seen - terms @ plane)
        kept = distance <= max(3 * float(np.median(distance)), 4.0)
    level, down, right = plane
    return (level + down * y[:, None] + right * x[None, :]).astype(np.float32, copy=False)  # type: ignore[no-any-return]
