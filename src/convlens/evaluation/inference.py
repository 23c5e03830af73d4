"""Batched inference over a split: logits, features and test-time augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlens.data.normalize import Normalize
from convlens.system.progress import ProgressBar

# normalized images (N, C, H, W) -> weighted views of them
TTA = Callable[[Tensor], list[tuple[float, Tensor]]]


def make_tta(hflip: bool) -> TTA:
    """Return test-time augmentation: each image and two translations by one pixel along the diagonal.

    The image weighs as much as both translations together (K. Jordan 2024).

    Args:
        hflip: Whether to add the mirror image of every view.
    """

    def views(x: Tensor) -> list[tuple[float, Tensor]]:
        height, width = x.shape[2:]
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect" if min(height, width) > 1 else "replicate")
        translated = [padded[:, :, :height, :width], padded[:, :, 2:, 2:]]
        plain = [(0.5, x), *((0.25, view) for view in translated)]
        if not hflip:
            return plain
        return [(weight / 2, view) for weight, one in plain for view in (one, one.flip(3))]

    return views


def normalized_batches(
    model: nn.Module, images: Tensor, normalize: Normalize, batch_size: int, autocast: AbstractContextManager[object]
) -> Iterator[Tensor]:
    """Yield normalized batches of uint8 images (N, C, H, W); the model is in evaluation mode meanwhile."""
    device = next(model.parameters()).device
    normalize = normalize.to(device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast, ProgressBar("evaluating", len(images)) as progress:
            for start in range(0, len(images), batch_size):
                batch = normalize(images[start : start + batch_size].to(device))
                yield batch.contiguous(memory_format=torch.channels_last)
                progress.update(len(batch))
    finally:
        model.train(training)


def compute_logits(
    model: nn.Module,
    images: Tensor,
    normalize: Normalize,
    *,
    batch_size: int = 500,
    autocast: AbstractContextManager[object] | None = None,
    tta: TTA | None = None,
) -> Tensor:
    """Compute the logits of images on the model's device.

    Args:
        model: The model; it is put into evaluation mode for the call.
        images: uint8 (N, C, H, W).
        normalize: Turns images into the model's input.
        batch_size: Images in one forward pass.
        autocast: Context manager for mixed precision.
        tta: Test-time augmentation: return the weighted mean of the logits over the views.

    Returns:
        Logits, float32 (N, K).
    """
    chunks = []
    for batch in normalized_batches(model, images, normalize, batch_size, autocast or nullcontext()):
        views = tta(batch) if tta else [(1.0, batch)]
        chunks.append(sum(w * model(x.contiguous(memory_format=torch.channels_last)).float() for w, x in views))
    return torch.cat(chunks)


def compute_outputs(
    model: nn.Module, images: Tensor, normalize: Normalize, *, batch_size: int = 500
) -> tuple[Tensor, Tensor]:
    """Compute logits and features of uint8 images (N, C, H, W).

    Returns:
        Logits, float32 (N, K), and features, float32 (N, D): the spatial means of the last feature maps.
    """
    logits, features = [], []
    for batch in normalized_batches(model, images, normalize, batch_size, nullcontext()):
        maps = model.features(batch)  # type: ignore[operator]  # (N, D, H', W')
        logits.append(model.head(maps).float())  # type: ignore[operator]
        features.append(maps.float().mean(dim=(2, 3)))
    return torch.cat(logits), torch.cat(features)
