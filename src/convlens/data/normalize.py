"""Normalization: from pixels to the input of a model, and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Compute (pixels / 255 - mean) / std.

    Args:
        mean: Per-channel mean of pixels in 0..1.
        std: Per-channel standard deviation.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        mean_, std_ = torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)
        self.register_buffer("scale", 1 / (255 * std_), persistent=False)
        self.register_buffer("offset", -mean_ / std_, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return normalized float32 images (N, C, H, W) for uint8 ``pixels`` (N, C, H, W)."""
        return pixels.to(self.scale.dtype) * self.scale + self.offset

    def invert(self, x: Tensor) -> Tensor:
        """Return uint8 pixels (N, C, H, W) for normalized images ``x`` (N, C, H, W)."""
        return ((x - self.offset) / self.scale).round().clamp(0, 255).to(torch.uint8)
