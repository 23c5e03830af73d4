"""Augmentation of whole batches: pure functions of (batch, random numbers)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


@dataclass(frozen=True)
class BatchRandom:
    """Random numbers for a batch, one row per image.

    A rank with a slice of the batch draws numbers for the whole batch and keeps its rows, so that results do not
    depend on the number of ranks.

    Args:
        generator: The source of the numbers; they are on its device.
        count: The number of images in the whole batch.
        rows: The slice of the batch that is on this rank, N images.
    """

    generator: Generator
    count: int
    rows: slice

    @classmethod
    def seeded(cls, seed: int, count: int) -> BatchRandom:
        """Return random numbers for a whole batch of ``count`` images, on the CPU."""
        return cls(Generator().manual_seed(seed), count, slice(None))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return numbers, float (N,), in [low, high)."""
        drawn = torch.rand(self.count, generator=self.generator, device=self.generator.device)
        return drawn[self.rows] * (high - low) + low

    def integers(self, high: int) -> Tensor:
        """Return integers, int64 (N,), in [0, high)."""
        return torch.randint(0, high, (self.count,), generator=self.generator, device=self.generator.device)[self.rows]

    def beta(self, alpha: float) -> Tensor:
        """Return one number () from Beta(alpha, alpha) for the whole batch, as a ratio of gamma variables."""
        shape = torch.full((2,), alpha, device=self.generator.device)
        a, b = torch._standard_gamma(shape, generator=self.generator).unbind()
        return torch.where(a + b > 0, a / (a + b), 0.5)


def translate(x: Tensor, draws: BatchRandom, pixels: int) -> Tensor:
    """Move each image (N, C, H, W) by up to ``pixels`` whole pixels in each direction, with reflected borders."""
    n, _, height, width = x.shape
    pad_y, pad_x = min(pixels, height - 1), min(pixels, width - 1)
    padded = F.pad(x, (pad_x, pad_x, pad_y, pad_y), mode="reflect")
    top, left = draws.integers(2 * pad_y + 1)[:, None], draws.integers(2 * pad_x + 1)[:, None]  # (N, 1)
    rows = (top + torch.arange(height, device=x.device))[:, :, None]  # (N, H, 1)
    columns = (left + torch.arange(width, device=x.device))[:, None, :]  # (N, 1, W)
    image = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows, columns].permute(0, 3, 1, 2)  # (N, C, H, W), channels last


def hflip(x: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the ``chosen`` images, bool (N,), of ``x`` (N, C, H, W) left to right."""
    return torch.where(chosen[:, None, None, None], x.flip(3), x)


def affine(x: Tensor, draws: BatchRandom, degrees: float, scale: float) -> Tensor:
    """Rotate each image by up to ``degrees`` and zoom by a factor in 1 +- ``scale``, about its center.

    Bilinear; areas outside the image repeat its border.
    """
    n, height, width = len(x), x.shape[2], x.shape[3]
    angle = draws.uniform(-degrees, degrees) * (math.pi / 180)  # (N,)
    zoom = 1 / draws.uniform(1 - scale, 1 + scale)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    zero = torch.zeros_like(cos)
    # Coordinates run from -1 to 1 on both axes, so the rotation of a non-square image needs its aspect ratio.
    aspect = height / width
    matrix = torch.stack([cos, -sin * aspect, zero, sin / aspect, cos, zero], dim=1).view(n, 2, 3)
    return resample(x, matrix)


def center_crop_resize(x: Tensor, draws: BatchRandom, probability: float, ratio: float) -> Tensor:
    """With ``probability``, crop an image to the center ``ratio`` of its sides and resize the crop to full size."""
    chosen = draws.uniform() < probability
    matrix = (torch.eye(2, 3, device=x.device) * ratio).expand(len(x), 2, 3)
    return torch.where(chosen[:, None, None, None], resample(x, matrix), x)


def resample(x: Tensor, matrix: Tensor) -> Tensor:
    """Sample images (N, C, H, W) with ``matrix`` (N, 2, 3), which maps output to input coordinates."""
    grid = F.affine_grid(matrix.to(x.dtype), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def cutout(x: Tensor, draws: BatchRandom, size: int) -> Tensor:
    """Set one ``size`` x ``size`` square of each normalized image to 0, the mean (DeVries & Taylor 2017)."""
    inside = random_box(x, draws, torch.full((len(x),), float(size), device=x.device))
    return x.masked_fill(inside, 0.0)


def random_box(x: Tensor, draws: BatchRandom, side: Tensor) -> Tensor:
    """Return a mask, bool (N, 1, H, W), of one square of ``side`` (N,) pixels per image, centered anywhere."""
    n, _, height, width = x.shape
    center_y = draws.uniform(0, height)[:, None, None, None]
    center_x = draws.uniform(0, width)[:, None, None, None]
    half = side[:, None, None, None] / 2
    rows = torch.arange(height, device=x.device).view(1, 1, -1, 1) + 0.5
    columns = torch.arange(width, device=x.device).view(1, 1, 1, -1) + 0.5
    return ((rows - center_y).abs() < half) & ((columns - center_x).abs() < half)


def color_jitter(x: Tensor, draws: BatchRandom, strength: float) -> Tensor:
    """Change brightness, contrast and saturation of normalized images by up to the fraction ``strength`` each."""
    brightness, contrast, saturation = (draws.uniform(-strength, strength)[:, None, None, None] for _ in range(3))
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    gray = x.mean(dim=1, keepdim=True)  # (N, 1, H, W)
    x = gray + (x - gray) * (1 + saturation)
    return (x - mean) * (1 + contrast) + mean + brightness


def soft_labels(labels: Tensor, classes: int) -> Tensor:
    """Return labels (N,) as one-hot float probabilities (N, K); probabilities (N, K) pass unchanged."""
    return F.one_hot(labels, classes).float() if labels.dim() == 1 else labels


def swap_pairs(x: Tensor) -> Tensor:
    """Return ``x`` with every two neighboring rows swapped; an odd last row stays.

    Batches are shuffled, so a neighbor is a random partner. A rank's slice of a batch never separates a pair.
    """
    rows = torch.arange(len(x), device=x.device) ^ 1
    return x[rows.clamp_(max=len(x) - 1)]


def mixup(x: Tensor, labels: Tensor, draws: BatchRandom, alpha: float, classes: int) -> tuple[Tensor, Tensor]:
    """Blend each image and label with its neighbor, with a weight from Beta(alpha, alpha) (Zhang et al. 2018).

    Labels are (N,) or (N, K). Return the images and label probabilities (N, K).
    """
    weight = draws.beta(alpha)
    y = soft_labels(labels, classes)
    return weight * x + (1 - weight) * swap_pairs(x), weight * y + (1 - weight) * swap_pairs(y)


def cutmix(x: Tensor, labels: Tensor, draws: BatchRandom, alpha: float, classes: int) -> tuple[Tensor, Tensor]:
    """Paste a square of its neighbor into each image, and mix labels by the pasted area (Yun et al. 2019).

    The area of the square is a fraction from Beta(alpha, alpha). Labels are (N,) or (N, K). Return the images and
    label probabilities (N, K).
    """
    weight = draws.beta(alpha)
    side = ((1 - weight) * x.shape[2] * x.shape[3]).sqrt().expand(len(x))  # (N,)
    inside = random_box(x, draws, side)  # (N, 1, H, W)
    pasted = inside.float().mean(dim=(1, 2, 3)).unsqueeze(1)  # (N, 1); the border clips some squares
    y = soft_labels(labels, classes)
    return torch.where(inside, swap_pairs(x), x), (1 - pasted) * y + pasted * swap_pairs(y)
