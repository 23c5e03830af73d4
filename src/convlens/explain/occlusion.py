"""What an answer hangs on, found by covering one place of the image after the other. Without PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convlens.data.images import Pixels

Heat = NDArray[np.float32]


BATCH_BYTES = 8 << 20  # of covered images that are made at a time


@dataclass(frozen=True)
class Occlusion:
    """An image with a square over one place after the other (Zeiler, Fergus 2014).

    The square is a quarter of the image wide, in the colour of the image's border. It works for every net, also for one
    that cannot be differentiated.
    """

    pixels: Pixels  # uint8 (C, H, W): the image itself
    places: tuple[tuple[int, int], ...]  # top and left of the squares, M
    side: int  # of the square, in pixels

    @classmethod
    def of(cls, pixels: Pixels) -> Occlusion:
        """Choose the places of an image, uint8 (C, H, W)."""
        _, height, width = pixels.shape
        side = max(min(height, width) // 4, 1)
        step = max(side // 3, 1)
        places = tuple(
            (y, x)
            for y in sorted({*range(0, height - side, step), height - side})
            for x in sorted({*range(0, width - side, step), width - side})
        )
        return cls(pixels, places, side)

    @property
    def nbytes(self) -> int:
        """Return how many bytes :meth:`cover` takes for all images, which for a long one are very many."""
        return (len(self.places) + 1) * self.pixels.nbytes

    def cover(self, start: int = 0, stop: int | None = None) -> Pixels:
        """Return the images, uint8 (N, C, H, W), from number ``start`` to before ``stop``.

        There are M + 1: the image covered at each place, and at last itself.
        """
        border = np.ones(self.pixels.shape[1:], bool)
        border[1:-1, 1:-1] = False
        paper = np.median(self.pixels[:, border], axis=1).astype(np.uint8)[:, None, None]  # (C, 1, 1)
        places = self.places[start:stop]
        whole = stop is None or stop > len(self.places)
        images = np.repeat(self.pixels[None], len(places) + whole, axis=0)
        for image, (y, x) in zip(images, places, strict=False):
            image[:, y : y + self.side, x : x + self.side] = paper
        return images

    def heat(self, probabilities: NDArray[np.float32], label: int) -> Heat:
        """Return by how much the probability of ``label`` falls where the image is covered: float32 (H, W), -1..1.

        ``probabilities`` (M + 1, K) are those of :meth:`cover`. A pixel gets the mean over the squares over it.
        """
        shares = probabilities[:, label]
        total, count = np.zeros((2, *self.pixels.shape[1:]), np.float32)
        for (y, x), share in zip(self.places, shares, strict=False):
            total[y : y + self.side, x : x + self.side] += shares[-1] - share
            count[y : y + self.side, x : x + self.side] += 1
        mean: Heat = total / count
        return mean


def occlusion_map(classify: Callable[[Pixels], NDArray[np.float32]], pixels: Pixels, label: int) -> Heat:
    """Return :meth:`Occlusion.heat` of one image, uint8 (C, H, W).

    ``classify`` gives probabilities (N, K) of uint8 images (N, C, H, W).
    """
    occlusion = Occlusion.of(pixels)
    batch = max(BATCH_BYTES // pixels.nbytes, 1)
    starts = range(0, len(occlusion.places) + 1, batch)
    return occlusion.heat(np.concatenate([classify(occlusion.cover(at, at + batch)) for at in starts]), label)
