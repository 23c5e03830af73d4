"""Finding copies among images: equal pixel by pixel, or nearly: moved by a pixel, saved again, brighter or darker."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from convlens.data.resize import shrink
from convlens.system.progress import track

SIDE = 64  # larger images are compared at this size

DIMENSIONS = 128

MIN_SIMILARITY = 0.985  # correlation of two images that counts as a copy

SAME_TINT = 16  # levels by which the mean of a channel may differ, brightness apart

# four of the eight neighbours: the other four are these, seen from the other image
MOVES = ((0, 0), (0, 1), (1, -1), (1, 0), (1, 1))

BLOCK = 2048


def find_exact_duplicates(images: Tensor) -> list[list[int]]:
    """Return groups of rows of uint8 images (N, C, H, W) that are equal pixel by pixel, in order."""
    groups: dict[bytes, list[int]] = {}
    for row, image in enumerate(images.numpy()):
        groups.setdefault(hashlib.blake2b(image.tobytes(), digest_size=16).digest(), []).append(row)
    return [group for group in groups.values() if len(group) > 1]


def describe_images(images: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is compared of uint8 images (M, C, H, W), the ``rows`` (N,): shapes and tints.

    Shapes are float32 (N, H, W): grey, at most 64 pixels wide, with mean 0 and norm 1, so that brightness and contrast
    make no difference; an image of one colour is 0 everywhere. Tints are float32 (N, C): each channel's mean less the
    mean of all, in levels.
    """
    parts, tints = [], []
    for start in range(0, len(rows), BLOCK):
        chosen = rows[start : start + BLOCK]
        pixels = images[chosen].float()
        grey = pixels.mean(dim=1, keepdim=True)
        tints.append(pixels.mean(dim=(2, 3)) - grey.mean(dim=(2, 3)))
        parts.append(centre(shrink(grey, SIDE)[:, 0]))
    return torch.cat(parts), torch.cat(tints)


def centre(x: Tensor) -> Tensor:
    """Return images (N, H, W) with mean 0 and norm 1."""
    x = x - x.mean(dim=(1, 2), keepdim=True)
    norms: Tensor = x.flatten(1).norm(dim=1).clamp(min=1e-6)
    return x / norms[:, None, None]


def find_near_duplicates(x: Tensor, tints: Tensor) -> list[list[int]]:
    """Return groups of rows of shapes (N, H, W) and tints (N, C) that are nearly the same picture.

    Two are if they correlate by 0.985 where they overlap, as they are or one pixel apart, and have the same tint. All
    pairs are looked at, in 128 dimensions that hold most of the variance: what is left out is taken as if it agreed.
    Pairs that pass, with room for a border that has moved in, are compared whole.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n, height, width = x.shape
    flat = x.flatten(1)
    some = flat[torch.linspace(0, n - 1, min(n, 10_000)).long()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # uncentred: products of the sketches are those of the images
        basis = torch.svd_lowrank(some, q=min(DIMENSIONS, *some.shape))[2]  # (H W, 128), orthonormal

    def sketch(rows: Tensor) -> Tensor:
        """Return (N, 129): products of two of these are at least those of the images."""
        inside = rows @ basis
        left = ((rows * rows).sum(dim=1) - (inside * inside).sum(dim=1)).clamp(min=0).sqrt()
        return torch.cat([inside, left[:, None]], dim=1)

    base = sketch(flat)
    pairs = []
    for start in track(range(0, n, BLOCK), "looking for copies", len(range(0, n, BLOCK))):
        rows = slice(start, min(start + BLOCK, n))
        for dy, dx in MOVES:
            if abs(dy) >= height or abs(dx) >= width:
                continue
            moved = sketch(centre(move(x[rows], dy, dx)).flatten(1))
            # unmoved, a pair is found from its first image; the overlaps of moved ones are not the same both ways
            for other in range(start if (dy, dx) == (0, 0) else 0, n, 8 * BLOCK):
                likeness = moved @ base[other : other + 8 * BLOCK].T
                a, b = (likeness > MIN_SIMILARITY - 1 / min(height, width)).nonzero(as_tuple=True)
                a, b = a + start, b + other
                keep = a < b if (dy, dx) == (0, 0) else a != b
                a, b = a[keep], b[keep]
                for first in range(0, len(a), BLOCK):
                    some_a, some_b = a[first : first + BLOCK], b[first : first + BLOCK]
                    alike = overlap_likeness(x[some_a], x[some_b], dy, dx) >= MIN_SIMILARITY
                    alike &= ((tints[some_a] - tints[some_b]).abs() <= SAME_TINT).all(dim=1)
                    pairs.append(torch.stack([some_a[alike], some_b[alike]]))
    found = torch.cat(pairs, dim=1).numpy() if pairs else np.empty((2, 0), dtype=np.int64)
    graph = coo_matrix((np.ones(found.shape[1]), (found[0], found[1])), shape=(n, n))
    _, number = connected_components(graph, directed=False)
    members = np.unique(found)
    groups: dict[int, list[int]] = {}
    for row in members.tolist():
        groups.setdefault(int(number[row]), []).append(row)
    return list(groups.values())


def move(x: Tensor, dy: int, dx: int) -> Tensor:
    """Return images (N, H, W) moved down by ``dy`` and right by ``dx`` pixels (-1, 0 or 1); the border is repeated."""
    height, width = x.shape[1:]
    rows = (torch.arange(height) - dy).clamp(0, height - 1)
    columns = (torch.arange(width) - dx).clamp(0, width - 1)
    return x[:, rows][:, :, columns]


def overlap_likeness(a: Tensor, b: Tensor, dy: int, dx: int) -> Tensor:
    """Return the correlation (N,) of ``a`` moved by (dy, dx) with ``b``, both (N, H, W), where they overlap."""
    height, width = a.shape[1:]

    def cut(x: Tensor, down: int, right: int) -> Tensor:
        top, left = max(down, 0), max(right, 0)
        return x[:, top : height + min(down, 0), left : width + min(right, 0)]

    return (centre(cut(a, -dy, -dx)) * centre(cut(b, dy, dx))).sum(dim=(1, 2))
