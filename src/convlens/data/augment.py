"""Augmentation of whole batches: each function is a pure function of (batch, generator)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def uniform(n: int, low: float, high: float, g: Generator) -> Tensor:
    """Return ``n`` random numbers in [low, high) on the generator's device."""
    return torch.rand(n, generator=g, device=g.device) * (high - low) + low


def shift(x: Tensor, g: Generator, pixels: int) -> Tensor:
    """Move every image (N, C, H, W) by up to ``pixels`` whole pixels in each direction; the border is mirrored."""
    n, _, height, width = x.shape
    pad_y, pad_x = min(pixels, height - 1), min(pixels, width - 1)
    padded = F.pad(x, (pad_x, pad_x, pad_y, pad_y), mode="reflect")
    top = torch.randint(0, 2 * pad_y + 1, (n, 1), generator=g, device=g.device)
    left = torch.randint(0, 2 * pad_x + 1, (n, 1), generator=g, device=g.device)
    rows = (top + torch.arange(height, device=x.device))[:, :, None]  # (N, H, 1)
    columns = (left + torch.arange(width, device=x.device))[:, None, :]  # (N, 1, W)
    image = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows, columns].permute(0, 3, 1, 2)  # (N, C, H, W), channels last


def mirror(x: Tensor, chosen: Tensor) -> Tensor:
    """Mirror left to right the images (N, C, H, W) that are ``chosen``, bool (N,)."""
    return torch.where(chosen[:, None, None, None], x.flip(3), x)


def affine(x: Tensor, g: Generator, degrees: float, scale: float) -> Tensor:
    """Turn each image by up to ``degrees`` and zoom it by a factor in 1 -+ ``scale``, about its centre.

    Bilinear; what comes in from outside is the border pixel.
    """
    n, height, width = len(x), x.shape[2], x.shape[3]
    angle = uniform(n, -degrees, degrees, g) * (math.pi / 180)
    zoom = 1 / uniform(n, 1 - scale, 1 + scale, g)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    zero = torch.zeros_like(cos)
    # coordinates run from -1 to 1 on both axes, so the turn of a non-square image needs its aspect ratio
    aspect = height / width
    matrix = torch.stack([cos, -sin * aspect, zero, sin / aspect, cos, zero], dim=1).view(n, 2, 3)
    return resample(x, matrix)


def centre_crop_resize(x: Tensor, g: Generator, probability: float, fraction: float) -> Tensor:
    """With ``probability``, cut an image to the centre ``fraction`` of its side and resize that to the full size."""
    n = len(x)
    chosen = torch.rand(n, generator=g, device=g.device) < probability
    if not bool(chosen.any()):
        return x
    side = torch.where(chosen, fraction, 1.0)
    zero = torch.zeros_like(side)
    return resample(x, torch.stack([side, zero, zero, zero, side, zero], dim=1).view(n, 2, 3))


def resample(x: Tensor, matrix: Tensor) -> Tensor:
    """Sample images (N, C, H, W) at the affine ``matrix`` (N, 2, 3) of output to input coordinates."""
    grid = F.affine_grid(matrix.to(x.dtype), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def cutout(x: Tensor, g: Generator, size: int) -> Tensor:
    """Set one ``size`` x ``size`` square of each image to 0, the mean of normalised pixels (DeVries, Taylor 2017)."""
    inside = random_box(x, g, torch.full((len(x),), float(size), device=x.device))
    return x.masked_fill(inside, 0.0)


def random_box(x: Tensor, g: Generator, side: Tensor) -> Tensor:
    """Return a mask, bool (N, 1, H, W), of one square of ``side`` (N,) pixels each, centred anywhere."""
    n, _, height, width = x.shape
    centre_y = uniform(n, 0, height, g)[:, None, None, None]
    centre_x = uniform(n, 0, width, g)[:, None, None, None]
    half = side[:, None, None, None] / 2
    rows = torch.arange(height, device=x.device).view(1, 1, -1, 1) + 0.5
    columns = torch.arange(width, device=x.device).view(1, 1, 1, -1) + 0.5
    return ((rows - centre_y).abs() < half) & ((columns - centre_x).abs() < half)


def colour_jitter(x: Tensor, g: Generator, strength: float) -> Tensor:
    """Change brightness, contrast and saturation of normalised images by up to ``strength`` (a share) each."""
    n = len(x)
    brightness, contrast, saturation = (uniform(n, -strength, strength, g)[:, None, None, None] for _ in range(3))
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * (1 + saturation)
    return (x - mean) * (1 + contrast) + mean + brightness


def soft_labels(labels: Tensor, classes: int) -> Tensor:
    """Return labels (N,) as float probabilities (N, K); probabilities stay what they are."""
    return F.one_hot(labels, classes).float() if labels.dim() == 1 else labels


def sample_beta(alpha: float, g: Generator) -> float:
    """Draw one number from Beta(alpha, alpha), as a ratio of gamma variables drawn with ``g``."""
    shape = torch.full((2,), alpha, device=g.device)
    a, b = torch._standard_gamma(shape, generator=g).tolist()
    return a / (a + b) if a + b > 0 else 0.5


def mixup(x: Tensor, labels: Tensor, g: Generator, alpha: float, classes: int) -> tuple[Tensor, Tensor]:
    """Blend each image and label with another of the batch, weight from Beta(alpha, alpha) (Zhang et al. 2018).

    Labels are (N,) or (N, K); returned are images and label probabilities (N, K).
    """
    share = sample_beta(alpha, g)
    other = torch.randperm(len(x), generator=g, device=g.device)
    y = soft_labels(labels, classes)
    return share * x + (1 - share) * x[other], share * y + (1 - share) * y[other]


def cutmix(x: Tensor, labels: Tensor, g: Generator, alpha: float, classes: int) -> tuple[Tensor, Tensor]:
    """Paste a square of another image into each; labels mix as the pixels do (Yun et al. 2019).

    The square's area is Beta(alpha, alpha) of the image; labels are (N,) or (N, K), returned as (N, K).
    """
    share = sample_beta(alpha, g)
    side = math.sqrt((1 - share) * x.shape[2] * x.shape[3])
    inside = random_box(x, g, torch.full((len(x),), side, device=x.device))  # (N, 1, H, W)
    other = torch.randperm(len(x), generator=g, device=g.device)
    pasted = inside.float().mean(dim=(1, 2, 3)).unsqueeze(1)  # what the border cut off does not count
    y = soft_labels(labels, classes)
    return torch.where(inside, x[other], x), (1 - pasted) * y + pasted * y[other]
