"""Downscaling of whole batches, for progressive resizing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resized_shape(shape: Sequence[int], size: int) -> tuple[int, int]:
    """Return ``shape`` (height, width) scaled down so that the longer side has at most ``size`` pixels."""
    height, width = shape
    scale = min(size / max(height, width), 1.0)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def downscale(images: Tensor, size: int) -> Tensor:
    """Return images (N, C, H, W) scaled down so that their longer side has at most ``size`` pixels.

    Bilinear with antialiasing.
    """
    shape = resized_shape(images.shape[2:], size)
    if shape == tuple(images.shape[2:]):
        return images
    small = F.interpolate(images, size=shape, mode="bilinear", antialias=True, align_corners=False)
    return small.contiguous(memory_format=torch.channels_last)
