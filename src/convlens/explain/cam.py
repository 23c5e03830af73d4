"""Class activation maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlens.explain.activations import eval_mode, get_stage, record_outputs


def class_activation_map(model: nn.Module, x: Tensor, label: int, stage: str | None = None) -> Tensor:
    """Compute the class activation map of a class with HiResCAM (Draelos & Carin 2020).

    The feature maps are multiplied by the gradient of the class's logit, summed over the channels, clipped at 0 and
    resized to the image. Grad-CAM (Selvaraju et al. 2017) averages the gradient over each map first. That is the same
    for a head that averages the maps; for max pooling, which our models use, it highlights positions that the logit
    does not depend on.

    Args:
        model: A model with ``features``, ``head`` and named stages.
        x: Normalized images, float (N, C, H, W).
        label: Index of the class.
        stage: Name of the stage; by default the last feature maps.

    Returns:
        Maps, float (N, H, W), 0..1. The maximum of each map is 1, or all values are 0 if nothing supports the class.

    Raises:
        UnknownNameError: If the model has no such stage.
    """
    with torch.enable_grad(), eval_mode(model):
        if stage is None:
            maps = model.features(x).detach().requires_grad_()  # type: ignore[operator]
            logits = model.head(maps)  # type: ignore[operator]
        else:
            # the input requires a gradient, so that the stage's output has one even if all earlier layers are frozen
            with record_outputs({stage: get_stage(model, stage)}) as outputs:
                logits = model(x.detach().requires_grad_())
            maps = outputs[stage]
        score = logits[:, label]
        if getattr(model, "log_probabilities", False):  # they differ from logits by a constant common to all classes
            score = score - logits.mean(dim=1)
        (gradient,) = torch.autograd.grad(score.sum(), maps)
    heatmap = F.relu((gradient * maps.detach()).sum(dim=1, keepdim=True))  # (N, 1, H', W')
    heatmap = F.interpolate(heatmap, x.shape[2:], mode="bilinear", align_corners=False).squeeze(1)
    peak = heatmap.amax(dim=(1, 2), keepdim=True)
    return torch.where(peak > 0, heatmap / peak, heatmap)
