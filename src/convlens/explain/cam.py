"""Where a net looks: the class activation map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlens.explain.activations import get_stage, in_use, recording


def class_activation_map(net: nn.Module, x: Tensor, label: int, stage: str | None = None) -> Tensor:
    """Return where in the images the net sees the class ``label``: float (N, H, W), 0..1, of normalised (N, C, H, W).

    HiResCAM (Draelos, Carin 2020): the maps of a stage times the gradient of the class's logit by them, summed over the
    channels, negative values left out, then brought to the image's size. By default the last spatial map. Grad-CAM
    (Selvaraju et al. 2017) takes the mean of the gradient over each map first, which is the same where the head
    averages; where it takes the maximum, as that of our nets does, the mean lays heat on places that the logit does not
    come from. The largest value of an image is 1, or all are 0 where nothing speaks for the class. Raises UnknownName
    for a stage that the net has not.
    """
    with torch.enable_grad(), in_use(net):
        if stage is None:
            maps = net.features(x).detach().requires_grad_()  # type: ignore[operator]
            logits = net.head(maps)  # type: ignore[operator]
        else:
            # pixels that want a gradient, so that the stage's output has one even if all before it is frozen
            with recording({stage: get_stage(net, stage)}) as outputs:
                logits = net(x.detach().requires_grad_())
            maps = outputs[stage]
        score = logits[:, label]
        if getattr(net, "log_probabilities", False):  # from which logits differ by a number that all classes share
            score = score - logits.mean(dim=1)
        (gradient,) = torch.autograd.grad(score.sum(), maps)
    heat = F.relu((gradient * maps.detach()).sum(dim=1, keepdim=True))  # (N, 1, H', W')
    heat = F.interpolate(heat, x.shape[2:], mode="bilinear", align_corners=False).squeeze(1)
    top = heat.amax(dim=(1, 2), keepdim=True)
    return torch.where(top > 0, heat / top, heat)
