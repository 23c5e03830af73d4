"""Augmentation of whole batches: each function is a pure function of (batch, random draws)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


@dataclass(frozen=True)
class BatchRandom:
    """Random numbers for the images of a batch, a row each.

    Where only a part of the batch is here, they are drawn for all of it: what becomes of an image does not hang on how
    many processes share the work.
    """

    generator: Generator
    count: int  # images in the whole batch
    rows: slice  # which of them are here

    @classmethod
    def seeded(cls, seed: int, count: int) -> BatchRandom:
        """Return draws for a whole batch of ``count`` images, on the CPU."""
        return cls(Generator().manual_seed(seed), count, slice(None))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return random numbers (N,) in [low, high) on the generator's device."""
        drawn = torch.rand(self.count, generator=self.generator, device=self.generator.device)
        return drawn[self.rows] * (high - low) + low

    def integers(self, end: int) -> Tensor:
        """Return random whole numbers (N,) from 0 to below ``end``."""
        return torch.randint(0, end, (self.count,), generator=self.generator, device=self.generator.device)[self.rows]

    def beta(self, alpha: float) -> Tensor:
        """Draw one number () for the whole batch from Beta(alpha, alpha), as a ratio of gamma variables."""
        shape = torch.full((2,), alpha, device=self.generator.device)
        a, b = torch._standard_gamma(shape, generator=self.generator).unbind()
        return torch.where(a + b > 0, a / (a + b), 0.5)


def shift(x: Tensor, draws: BatchRandom, pixels: int) -> Tensor:
    """Move every image (N, C, H, W) by up to ``pixels`` whole pixels in each direction; the border is mirrored."""
    n, _, height, width = x.shape
    pad_y, pad_x = min(pixels, height - 1), min(pixels, width - 1)
    padded = F.pad(x, (pad_x, pad_x, pad_y, pad_y), mode="reflect")
    top, left = draws.integers(2 * pad_y + 1)[:, None], draws.integers(2 * pad_x + 1)[:, None]
    rows = (top + torch.arange(height, device=x.device))[:, :, None]  # (N, H, 1)
    columns = (left + torch.arange(width, device=x.device))[:, None, :]  # (N, 1, W)
    image = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows, columns].permute(0, 3, 1, 2)  # (N, C, H, W), channels last


def mirror(x: Tensor, chosen: Tensor) -> Tensor:
    """Mirror left to right the images (N, C, H, W) that are ``chosen``, bool (N,)."""
    return torch.where(chosen[:, None, None, None], x.flip(3), x)


def affine(x: Tensor, draws: BatchRandom, degrees: float, scale: float) -> Tensor:
    """Turn each image by up to ``degrees`` and zoom it by a factor in 1 -+ ``scale``, about its centre.

    Bilinear; what comes in from outside is the border pixel.
    """
    n, height, width = len(x), x.shape[2], x.shape[3]
    angle = draws.uniform(-degrees, degrees) * (math.pi / 180)
    zoom = 1 / draws.uniform(1 - scale, 1 + scale)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    zero = torch.zeros_like(cos)
    # coordinates run from -1 to 1 on both axes, so the turn of a non-square image needs its aspect ratio
    aspect = height / width
    matrix = torch.stack([cos, -sin * aspect, zero, sin / aspect, cos, zero], dim=1).view(n, 2, 3)
    return resample(x, matrix)


def center_crop_resize(x: Tensor, draws: BatchRandom, probability: float, fraction: float) -> Tensor:
    """With ``probability``, cut an image to the centre ``fraction`` of its side and resize that to the full size."""
    chosen = draws.uniform() < probability
    matrix = (torch.eye(2, 3, device=x.device) * fraction).expand(len(x), 2, 3)
    return torch.where(chosen[:, None, None, None], resample(x, matrix), x)


def resample(x: Tensor, matrix: Tensor) -> Tensor:
    """Sample images (N, C, H, W) at the affine ``matrix`` (N, 2, 3) of output to input coordinates."""
    grid = F.affine_grid(matrix.to(x.dtype), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def cutout(x: Tensor, draws: BatchRandom, size: int) -> Tensor:
    """Set one ``size`` x ``size`` square of each image to 0, the mean of normalised pixels (DeVries, Taylor 2017)."""
    inside = random_box(x, draws, torch.full((len(x),), float(size), device=x.device))
    return x.masked_fill(inside, 0.0)


def random_box(x: Tensor, draws: BatchRandom, side: Tensor) -> Tensor:
    """Return a mask, bool (N, 1, H, W), of one square of ``side`` (N,) pixels each, centred anywhere."""
    n, _, height, width = x.shape
    centre_y = draws.uniform(0, height)[:, None, None, None]
    centre_x = draws.uniform(0, width)[:, None, None, None]
    half = side[:, None, None, None] / 2
    rows = torch.arange(height, device=x.device).view(1, 1, -1, 1) + 0.5
    columns = torch.arange(width, device=x.device).view(1, 1, 1, -1) + 0.5
    return ((rows - centre_y).abs() < half) & ((columns - centre_x).abs() < half)


def color_jitter(x: Tensor, draws: BatchRandom, strength: float) -> Tensor:
    """Change brightness, contrast and saturation of normalised images by up to ``strength`` (a share) each."""
    brightness, contrast, saturation = (draws.uniform(-strength, strength)[:, None, None, None] for _ in range(3))
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * (1 + saturation)
    return (x - mean) * (1 + contrast) + mean + brightness


def soft_labels(labels: Tensor, classes: int) -> Tensor:
    """Return labels (N,) as float probabilities (N, K); probabilities stay what they are."""
    return F.one_hot(labels, classes).float() if labels.dim() == 1 else labels


def swap_pairs(x: Tensor) -> Tensor:
    """Return the rows of ``x`` with every two neighbours exchanged; an odd last one stays.

    A batch is shuffled, so a neighbour is as good a partner as any, and Ranks.part never separates the two.
    """
    rows = torch.arange(len(x), device=x.device) ^ 1
    return x[rows.clamp_(max=len(x) - 1)]


def mixup(x: Tensor, labels: Tensor, draws: BatchRandom, alpha: float, classes: int) -> tuple[Tensor, Tensor]:
    """Blend each image and label with its neighbour in the batch, weight from Beta(alpha, alpha) (Zhang et al. 2018).

    Labels are (N,) or (N, K); returned are images and label probabilities (N, K).
    """
    share = draws.beta(alpha)
    y = soft_labels(labels, classes)
    return share * x + (1 - share) * swap_pairs(x), share * y + (1 - share) * swap_pairs(y)


def cutmix(x: Tensor, labels: Tensor, draws: BatchRandom, alpha: float, classes: int) -> tuple[Tensor, Tensor]:
    """Paste a square of its neighbour into each image; labels mix as the pixels do (Yun et al. 2019).

    The square's area is Beta(alpha, alpha) of the image; labels are (N,) or (N, K), returned as (N, K).
    """
    share = draws.beta(alpha)
    side = ((1 - share) * x.shape[2] * x.shape[3]).sqrt().expand(len(x))  # (N,)
    inside = random_box(x, draws, side)  # (N, 1, H, W)
    pasted = inside.float().mean(dim=(1, 2, 3)).unsqueeze(1)  # what the border cut off does not count
    y = soft_labels(labels, classes)
    return torch.where(inside, swap_pairs(x), x), (1 - pasted) * y + pasted * swap_pairs(y)
