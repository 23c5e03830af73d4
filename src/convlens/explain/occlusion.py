"""Occlusion maps (Zeiler & Fergus 2014). Must not import torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convlens.data.images import Pixels

Heatmap = NDArray[np.float32]

BATCH_BYTES = 8 << 20  # of occluded images in one batch


@dataclass(frozen=True)
class Occlusion:
    """An image and the positions of a square that occludes it.

    The square's side is a quarter of the image's shorter side; its color is that of the image border. The method works
    for every model, even for one without gradients.
    """

    pixels: Pixels  # uint8 (C, H, W)
    positions: tuple[tuple[int, int], ...]  # top and left of the square, M positions
    side: int  # of the square, in pixels

    @classmethod
    def of(cls, pixels: Pixels) -> Occlusion:
        """Choose the positions for an image, uint8 (C, H, W)."""
        _, height, width = pixels.shape
        side = max(min(height, width) // 4, 1)
        step = max(side // 3, 1)
        positions = tuple(
            (y, x)
            for y in sorted({*range(0, height - side, step), height - side})
            for x in sorted({*range(0, width - side, step), width - side})
        )
        return cls(pixels, positions, side)

    @property
    def nbytes(self) -> int:
        """Bytes that :meth:`occlude` returns for all positions; very many for an elongated image."""
        return (len(self.positions) + 1) * self.pixels.nbytes

    def occlude(self, start: int = 0, stop: int | None = None) -> Pixels:
        """Return occluded images, uint8 (N, C, H, W), with indices ``start`` to ``stop``.

        There are M + 1 images: one for each position, and last the image itself.
        """
        border = np.ones(self.pixels.shape[1:], bool)
        border[1:-1, 1:-1] = False
        color = np.median(self.pixels[:, border], axis=1).astype(np.uint8)[:, None, None]  # (C, 1, 1)
        positions = self.positions[start:stop]
        include_original = stop is None or stop > len(self.positions)
        images = np.repeat(self.pixels[None], len(positions) + include_original, axis=0)
        for image, (y, x) in zip(images, positions, strict=False):
            image[:, y : y + self.side, x : x + self.side] = color
        return images

    def heatmap(self, probabilities: NDArray[np.float32], label: int) -> Heatmap:
        """Compute the occlusion map.

        Args:
            probabilities: For the M + 1 images of :meth:`occlude`, (M + 1, K).
            label: Index of the class.

        Returns:
            For each pixel the drop in probability of the class, averaged over the squares that cover the pixel: float32
            (H, W), -1..1.
        """
        scores = probabilities[:, label]
        total, count = np.zeros((2, *self.pixels.shape[1:]), np.float32)
        for (y, x), score in zip(self.positions, scores, strict=False):
            total[y : y + self.side, x : x + self.side] += scores[-1] - score
            count[y : y + self.side, x : x + self.side] += 1
        mean: Heatmap = total / count
        return mean


def occlusion_map(classify: Callable[[Pixels], NDArray[np.float32]], pixels: Pixels, label: int) -> Heatmap:
    """Compute the occlusion map of one image; see :meth:`Occlusion.heatmap`.

    Args:
        classify: Returns probabilities (N, K) of uint8 images (N, C, H, W).
        pixels: The image, uint8 (C, H, W).
        label: Index of the class.
    """
    occlusion = Occlusion.of(pixels)
    batch_size = max(BATCH_BYTES // pixels.nbytes, 1)
    starts = range(0, len(occlusion.positions) + 1, batch_size)
    probabilities = [classify(occlusion.occlude(start, start + batch_size)) for start in starts]
    return occlusion.heatmap(np.concatenate(probabilities), label)
