"""Nine image corruptions at five severities each, to measure robustness.

After Hendrycks & Dietterich 2019, with strengths for small images: lengths scale with the image size.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from convlens.data.augment import resample
from convlens.system.random import derive_seed

SEVERITIES = (1, 2, 3, 4, 5)

REFERENCE_SIDE = 28  # pixels; lengths below are for images of this size


def noise(x: Tensor, strength: float, g: Generator) -> Tensor:
    """Add Gaussian noise with a standard deviation of ``strength`` gray levels."""
    return x + strength * torch.randn(x.shape, generator=g)


def blur(x: Tensor, strength: float, g: Generator) -> Tensor:
    """Apply a Gaussian blur with a standard deviation of ``strength`` pixels."""
    sigma = strength * min(x.shape[2:]) / REFERENCE_SIDE
    radius = min(math.ceil(3 * sigma), min(x.shape[2:]) - 1)
    weights = torch.exp(-((torch.arange(-radius, radius + 1) / sigma) ** 2) / 2)
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0), mode="replicate"), weights, groups=x.shape[1])
    return F.conv2d(F.pad(x, (0, 0, radius, radius), mode="replicate"), weights.transpose(2, 3), groups=x.shape[1])


def contrast(x: Tensor, strength: float, g: Generator) -> Tensor:
    """Scale the contrast around the image mean by ``strength``."""
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + strength * (x - mean)


def brightness(x: Tensor, strength: float, g: Generator) -> Tensor:
    """Add ``strength`` gray levels."""
    return x + strength


def rotation(x: Tensor, strength: float, g: Generator) -> Tensor:
    """Rotate by ``strength`` degrees in a random direction."""
    angle = random_signs(len(x), g) * math.radians(strength)
    cos, sin = torch.cos(angle), torch.sin(angle)
    aspect = x.shape[2] / x.shape[3]  # coordinates run from -1 to 1 on both axes
    return warp(x, cos, -sin * aspect, sin / aspect, cos)


def shift(x: Tensor, strength: float, g: Generator) -> Tensor:
    """Translate by ``strength`` pixels in a random direction."""
    angle = 2 * math.pi * torch.rand(len(x), generator=g)
    length = 2 * strength / REFERENCE_SIDE  # coordinates run from -1 to 1
    one, zero = torch.ones(len(x)), torch.zeros(len(x))
    return warp(x, one, zero, zero, one, length * torch.cos(angle), length * torch.sin(angle))


def scale(x: Tensor, strength: float, g: Generator) -> Tensor:
    """Zoom in or out by the factor ``strength``."""
    zoom = strength ** random_signs(len(x), g)
    return warp(x, zoom, torch.zeros(len(x)), torch.zeros(len(x)), zoom)


def occlusion(x: Tensor, strength: float, g: Generator) -> Tensor:
    """Cover a random square with gray; its side is the fraction ``strength`` of the image side."""
    height, width = x.shape[2:]
    side = max(round(strength * min(height, width)), 1)
    top = torch.randint(0, height - side + 1, (len(x), 1), generator=g)
    left = torch.randint(0, width - side + 1, (len(x), 1), generator=g)
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows, inside_columns = (rows >= top) & (rows < top + side), (columns >= left) & (columns < left + side)
    covered = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]  # (N, 1, H, W)
    return torch.where(covered, 128.0, x)


def jpeg(x: Tensor, strength: float, g: Generator) -> Tensor:
    """Compress as JPEG of quality ``strength``."""
    decoded = []
    for image in x.round().byte().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(file, "JPEG", quality=int(strength))
        decoded.append(np.asarray(Image.open(file)).reshape(image.shape))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float()


def random_signs(n: int, g: Generator) -> Tensor:
    """Return ``n`` random signs, 1 or -1."""
    return 2.0 * torch.randint(0, 2, (n,), generator=g) - 1


def warp(x: Tensor, *matrix: Tensor) -> Tensor:
    """Apply the affine map ((a, b), (c, d)) plus (dx, dy) to each image; ``matrix`` is a, b, c, d[, dx, dy]."""
    a, b, c, d, *offset = matrix  # each (N,)
    dx, dy = offset or (torch.zeros_like(a), torch.zeros_like(a))
    return resample(x, torch.stack([a, b, dx, c, d, dy], dim=1).view(-1, 2, 3))


# name -> function, and its strength at each severity
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float, Generator], Tensor], tuple[float, ...]]] = {
    "noise": (noise, (10, 20, 35, 50, 70)),
    "blur": (blur, (0.5, 0.75, 1.0, 1.5, 2.0)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.2)),
    "brightness": (brightness, (25, 50, 75, 100, 125)),
    "rotation": (rotation, (5, 10, 15, 22, 30)),
    "shift": (shift, (1, 2, 3, 4, 6)),
    "scale": (scale, (1.1, 1.2, 1.3, 1.45, 1.6)),
    "occlusion": (occlusion, (0.15, 0.25, 0.35, 0.45, 0.55)),
    "jpeg": (jpeg, (50, 30, 20, 12, 7)),
}


def corrupt(images: Tensor, kind: str, severity: int, batch_size: int = 1000) -> Tensor:
    """Corrupt images. The result is deterministic.

    Args:
        images: uint8 (N, C, H, W).
        kind: A key of ``CORRUPTIONS``.
        severity: 1 to 5.
        batch_size: Images processed at a time.

    Returns:
        uint8 (N, C, H, W).
    """
    corruption, strengths = CORRUPTIONS[kind]
    generator = torch.Generator().manual_seed(derive_seed(list(CORRUPTIONS).index(kind), severity))
    chunks = [
        corruption(images[start : start + batch_size].float(), strengths[severity - 1], generator).round().clamp(0, 255)
        for start in range(0, len(images), batch_size)
    ]
    return torch.cat(chunks).to(torch.uint8)
