"""Make an image of ink on paper look like MNIST: remove the background, crop, scale and center."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convlens.data.images import InputStyle

MAX_INK_PIXELS = 4096 * 4096  # larger images are reduced first; a page of A4 at 400 dpi has 15.5 million
MAX_BORDER_SAMPLES = 65_536  # pixels; the whole border of most images, in less than a megabyte


def fit_ink(image: Image.Image, height: int, width: int, style: InputStyle) -> Image.Image:
    """Make a grayscale image of ink on paper (or light on dark) look like the images of MNIST.

    The background, estimated from the border, becomes black. The ink is cropped, scaled to ``style.content_size`` with
    its aspect ratio kept, and centered by its center of mass or its bounding box (LeCun et al. 1998, section III.A).

    Args:
        image: A PIL image of mode L. More than 4096 x 4096 pixels are first reduced by an integer factor. An image
            of the right size with a black border is returned unchanged.
        height: The height of the result, in pixels.
        width: The width of the result, in pixels.
        style: Size and centering of the ink.
    """
    if (count := image.width * image.height) > MAX_INK_PIXELS:
        image = image.reduce(math.ceil(math.sqrt(count / MAX_INK_PIXELS)))
    values = np.asarray(image, dtype=np.float32)  # (H, W), 0..255
    border = (values[0], values[-1], values[:, 0], values[:, -1])
    if values.shape == (height, width) and not any(side.any() for side in border):
        return image
    background = estimate_background(values)
    brightness = float(np.median(background))
    if values.shape == (height, width) and brightness < 64:
        return image
    # In place, because the image may be large.
    ink = np.subtract(*((background, values) if brightness > 127 else (values, background)), out=values)
    del background
    # The 20th darkest pixel: the darkest may be dust, and a fraction of the page would miss a small digit on it.
    rank = min(ink.size // 40 + 1, 20)
    peak = float(np.partition(ink, -rank, axis=None)[-rank])
    if peak < 16:  # an empty page
        return Image.new("L", (width, height))
    ink /= peak
    ink.clip(0, 1, out=ink)
    ink[ink < 0.25] = 0  # paper grain and camera noise
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return place_content(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], height, width, style)


def place_content(ink: NDArray[np.float32], height: int, width: int, style: InputStyle) -> Image.Image:
    """Scale cropped ``ink`` (h, w), 0..1, to the style's size and center it on a black image."""
    scale = style.content_size / max(ink.shape)
    size = (max(round(ink.shape[1] * scale), 1), max(round(ink.shape[0] * scale), 1))
    small = Image.fromarray((ink * 255).astype(np.uint8)).resize(size, Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float32)
    pixels = pixels * (255 / max(float(pixels.max()), 1.0))  # downscaling makes thin strokes pale
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


def estimate_background(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the background of a grayscale image (H, W): a plane fitted to its border, since lamps light one side.

    The plane is fitted by least squares, then again without outliers such as ink that touches the border. Long
    borders are subsampled.
    """
    height, width = values.shape
    step = math.ceil(2 * (height + width) / MAX_BORDER_SAMPLES)
    y, x = np.arange(height, dtype=np.float32) / height, np.arange(width, dtype=np.float32) / width
    # brightness, y and x along each side
    edges = [(values[0], 0 * x, x), (values[-1], 0 * x + y[-1], x), (values[:, 0], y, 0 * y)]
    edges.append((values[:, -1], y, 0 * y + x[-1]))
    samples, rows, columns = (np.concatenate([side[::step] for side in parts]) for parts in zip(*edges, strict=True))
    terms = np.stack([np.ones_like(samples), rows, columns], axis=1)
    inliers = np.abs(samples - np.median(samples)) < 96
    for _ in range(2):
        plane, *_ = np.linalg.lstsq(terms[inliers], samples[inliers], rcond=None)
        distance = np.abs(samples - terms @ plane)
        inliers = distance <= max(3 * float(np.median(distance)), 4.0)
    level, down, right = plane
    return (level + down * y[:, None] + right * x[None, :]).astype(np.float32, copy=False)  # type: ignore[no-any-return]
