"""Find exact duplicates and near-duplicates: shifted by a pixel, saved as JPEG again, brighter or darker."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from convlens.data.resize import downscale
from convlens.system.progress import track

MAX_SIDE_PIXELS = 64  # larger images are compared at this size
PROJECTION_DIMENSIONS = 128
MIN_CORRELATION = 0.985  # of near-duplicates
MAX_TINT_DIFFERENCE = 16  # levels, between the channel means without brightness
# Four of the eight neighbors: the other four are the same shifts, seen from the other image.
SHIFTS = ((0, 0), (0, 1), (1, -1), (1, 0), (1, 1))
BLOCK_ROWS = 2048  # images that are compared at a time


def find_exact_duplicates(images: Tensor) -> list[list[int]]:
    """Return groups of rows of uint8 images (N, C, H, W) with equal pixels, in order."""
    groups: dict[bytes, list[int]] = {}
    for row, image in enumerate(images.numpy()):
        groups.setdefault(hashlib.blake2b(image.tobytes(), digest_size=16).digest(), []).append(row)
    return [group for group in groups.values() if len(group) > 1]


def describe_images(images: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what near-duplicates are compared by.

    Args:
        images: uint8 (M, C, H, W).
        rows: The images to describe, int64 (N,).

    Returns:
        Shapes, float32 (N, H, W): gray, at most 64 pixels on a side, with mean 0 and norm 1, so that brightness and
        contrast do not count; constant images are 0. And tints, float32 (N, C): the mean of each channel minus the
        mean of all, in levels.
    """
    shapes, tints = [], []
    for some in torch.split(rows, BLOCK_ROWS):
        pixels = images[some].float()
        gray = pixels.mean(dim=1, keepdim=True)  # (n, 1, H, W)
        tints.append(pixels.mean(dim=(2, 3)) - gray.mean(dim=(2, 3)))
        shapes.append(standardize(downscale(gray, MAX_SIDE_PIXELS)[:, 0]))
    return torch.cat(shapes), torch.cat(tints)


def standardize(x: Tensor) -> Tensor:
    """Return images (N, H, W) with mean 0 and norm 1."""
    x = x - x.mean(dim=(1, 2), keepdim=True)
    norms: Tensor = x.flatten(1).norm(dim=1).clamp(min=1e-6)
    return x / norms[:, None, None]


def find_near_duplicates(shapes: Tensor, tints: Tensor) -> list[list[int]]:
    """Return groups of rows of near-duplicates.

    Two images are near-duplicates if their correlation is at least 0.985 where they overlap, unshifted or shifted by
    one pixel, and their tints are equal. All pairs are compared in 128 dimensions with most of the variance. The
    remaining dimensions count as equal, so no pair is missed; the candidates are then compared exactly.

    Args:
        shapes: float32 (N, H, W), from :func:`describe_images`.
        tints: float32 (N, C).
    """
    n, height, width = shapes.shape
    projection = Projection(shapes)
    base = projection(shapes)
    # A shift replaces up to 1 / side of the pixels, so the candidates have a lower correlation.
    threshold = MIN_CORRELATION - 1 / min(height, width)
    pairs = [torch.empty(2, 0, dtype=torch.int64)]
    for start in track(range(0, n, BLOCK_ROWS), "looking for duplicates", len(range(0, n, BLOCK_ROWS))):
        rows = shapes[start : start + BLOCK_ROWS]
        for dy, dx in SHIFTS:
            if abs(dy) >= height or abs(dx) >= width:
                continue
            unshifted = (dy, dx) == (0, 0)
            moved = projection(standardize(move(rows, dy, dx)))
            # Unshifted, correlation is symmetric. Shifted, the overlap depends on which image is moved.
            for other in range(start if unshifted else 0, n, 8 * BLOCK_ROWS):
                bound = moved @ base[other : other + 8 * BLOCK_ROWS].T
                a, b = (bound > threshold).nonzero(as_tuple=True)
                a, b = a + start, b + other
                keep = a < b if unshifted else a != b
                for some in torch.split(torch.stack([a[keep], b[keep]]), BLOCK_ROWS, dim=1):  # (2, n)
                    alike = overlap_correlation(shapes[some[0]], shapes[some[1]], dy, dx) >= MIN_CORRELATION
                    alike &= ((tints[some[0]] - tints[some[1]]).abs() <= MAX_TINT_DIFFERENCE).all(dim=1)
                    pairs.append(some[:, alike])
    return connected_rows(torch.cat(pairs, dim=1), n)


class Projection:
    """Projects images onto their principal components, such that products are upper bounds.

    Args:
        shapes: float (N, H, W); up to 10,000 of them determine the components.
    """

    def __init__(self, shapes: Tensor):
        n, flat = len(shapes), shapes.flatten(1)
        some = flat[torch.linspace(0, n - 1, min(n, 10_000)).long()]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # Not centered, so that the products of projections are those of the images.
            self._basis = torch.svd_lowrank(some, q=min(PROJECTION_DIMENSIONS, *some.shape))[2]  # (H W, 128)

    def __call__(self, x: Tensor) -> Tensor:
        """Return (N, 129) for images (N, H, W): the products of two rows are at least those of the images."""
        rows = x.flatten(1)
        projected = rows @ self._basis
        rest = ((rows * rows).sum(dim=1) - (projected * projected).sum(dim=1)).clamp(min=0).sqrt()
        return torch.cat([projected, rest[:, None]], dim=1)


def connected_rows(pairs: Tensor, n: int) -> list[list[int]]:
    """Return the groups of rows, of ``n``, that ``pairs``, int64 (2, M), connect."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    a, b = pairs.numpy()
    _, number = connected_components(coo_matrix((np.ones(len(a)), (a, b)), shape=(n, n)), directed=False)
    groups: dict[int, list[int]] = {}
    for row in torch.unique(pairs).tolist():
        groups.setdefault(int(number[row]), []).append(row)
    return list(groups.values())


def move(x: Tensor, dy: int, dx: int) -> Tensor:
    """Return images (N, H, W) moved down by ``dy`` and right by ``dx`` pixels (-1, 0 or 1), repeating the border."""
    height, width = x.shape[1:]
    rows = (torch.arange(height) - dy).clamp(0, height - 1)
    columns = (torch.arange(width) - dx).clamp(0, width - 1)
    return x[:, rows][:, :, columns]


def overlap_correlation(a: Tensor, b: Tensor, dy: int, dx: int) -> Tensor:
    """Return the correlation (N,) of ``a`` moved by (dy, dx) with ``b``, both (N, H, W), where they overlap."""
    height, width = a.shape[1:]

    def crop(x: Tensor, down: int, right: int) -> Tensor:
        top, left = max(down, 0), max(right, 0)
        return x[:, top : height + min(down, 0), left : width + min(right, 0)]

    return (standardize(crop(a, -dy, -dx)) * standardize(crop(b, dy, dx))).sum(dim=(1, 2))
