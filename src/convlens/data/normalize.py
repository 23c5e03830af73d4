"""Normalising: from the pixels of a data set to the numbers that a net takes, and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(pixels / 255 - mean) / std: from uint8 (N, C, H, W) to float32 of the same shape."""

    scale: Tensor
    offset: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        mean_, std_ = torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)
        self.register_buffer("scale", 1 / (255 * std_), persistent=False)
        self.register_buffer("offset", -mean_ / std_, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the net's input for uint8 pixels (N, C, H, W)."""
        return pixels.to(self.scale.dtype) * self.scale + self.offset

    def invert(self, x: Tensor) -> Tensor:
        """Return the net's input (N, C, H, W) as uint8 pixels again."""
        return ((x - self.offset) / self.scale).round().clamp(0, 255).to(torch.uint8)
