"""Batched inference over a split: logits, features, test-time augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlens.data.normalize import Normalize
from convlens.system.progress import ProgressBar

# normalised images (N, C, H, W) -> views of them, each with its weight
TTA = Callable[[Tensor], list[tuple[float, Tensor]]]


def make_tta(mirrored: bool) -> TTA:
    """Return the views of test-time augmentation: the image and its two shifts by a pixel along the diagonal.

    The image counts as much as both shifts; ``mirrored`` adds the mirror image of each (K. Jordan 2024).
    """

    def views(x: Tensor) -> list[tuple[float, Tensor]]:
        height, width = x.shape[2:]
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect" if min(height, width) > 1 else "replicate")
        shifted = [padded[:, :, :height, :width], padded[:, :, 2:, 2:]]
        plain = [(0.5, x), *((0.25, view) for view in shifted)]
        if not mirrored:
            return plain
        return [(weight / 2, view) for weight, one in plain for view in (one, one.flip(3))]

    return views


def normalized_batches(
    net: nn.Module, images: Tensor, normalise: Normalize, batch_size: int, autocast: AbstractContextManager[object]
) -> Iterator[Tensor]:
    """Yield uint8 images (N, C, H, W) in batches as ``net`` takes them, with the net in evaluation mode meanwhile."""
    device = next(net.parameters()).device
    normalise = normalise.to(device)
    training = net.training
    net.eval()
    try:
        with torch.no_grad(), autocast, ProgressBar("evaluating", len(images)) as meter:
            for start in range(0, len(images), batch_size):
                batch = normalise(images[start : start + batch_size].to(device))
                yield batch.contiguous(memory_format=torch.channels_last)
                meter.update(len(batch))
    finally:
        net.train(training)


def compute_logits(
    net: nn.Module,
    images: Tensor,
    normalise: Normalize,
    *,
    batch_size: int = 500,
    autocast: AbstractContextManager[object] | None = None,
    views: TTA | None = None,
) -> Tensor:
    """Return the logits, float32 (N, K), of uint8 images (N, C, H, W), computed where the net's weights are.

    With ``views`` they are the weighted mean over several views of each image: test-time augmentation. The net is in
    evaluation mode meanwhile, and put back afterwards.
    """
    parts = []
    for batch in normalized_batches(net, images, normalise, batch_size, autocast or nullcontext()):
        seen = views(batch) if views else [(1.0, batch)]
        parts.append(sum(w * net(x.contiguous(memory_format=torch.channels_last)).float() for w, x in seen))
    return torch.cat(parts)


def compute_outputs(
    net: nn.Module, images: Tensor, normalise: Normalize, *, batch_size: int = 500
) -> tuple[Tensor, Tensor]:
    """Return logits, float32 (N, K), and features, float32 (N, D), of uint8 images (N, C, H, W).

    The features are the means of the last spatial map over the image.
    """
    logits, features = [], []
    for batch in normalized_batches(net, images, normalise, batch_size, nullcontext()):
        maps = net.features(batch)  # type: ignore[operator]  # (N, D, H', W')
        logits.append(net.head(maps).float())  # type: ignore[operator]
        features.append(maps.float().mean(dim=(2, 3)))
    return torch.cat(logits), torch.cat(features)
