"""Where a net looks: the class activation map, and what its answer hangs on when parts of the image are covered."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from convlens.data.pictures import Pixels
from convlens.explain.stages import get_stage, recording

Heat = NDArray[np.float32]


def class_activation_map(net: nn.Module, x: Tensor, label: int, stage: str | None = None) -> Tensor:
    """Return where in the images the net sees the class ``label``: float (N, H, W), 0..1, of normalised (N, C, H, W).

    HiResCAM (Draelos, Carin 2020): the maps of a stage times the gradient of the class's logit by them, summed over the
    channels, negative values left out, then brought to the image's size. By default the last spatial map. Grad-CAM
    (Selvaraju et al. 2017) takes the mean of the gradient over each map first, which is the same where the head
    averages; where it takes the maximum, as that of our nets does, the mean lays heat on places that the logit does not
    come from. The largest value of an image is 1, or all are 0 where nothing speaks for the class. Raises UnknownName
    for a stage that the net has not.
    """
    net.eval()
    with torch.enable_grad():
        if stage is None:
            maps = net.features(x).detach().requires_grad_()  # type: ignore[operator]
            logits = net.head(maps)  # type: ignore[operator]
        else:
            # a pixel that wants a gradient, so that the stage's output has one even if all before it is frozen
            with recording({stage: get_stage(net, stage)}) as outputs:
                logits = net(x.detach().requires_grad_())
            maps = outputs[stage]
        (gradient,) = torch.autograd.grad(logits[:, label].sum(), maps)
    heat = F.relu((gradient * maps.detach()).sum(dim=1, keepdim=True))  # (N, 1, H', W')
    heat = F.interpolate(heat, x.shape[2:], mode="bilinear", align_corners=False).squeeze(1)
    return heat / heat.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)


def occlusion_map(classify: Callable[[Pixels], NDArray[np.float32]], pixels: Pixels, label: int) -> Heat:
    """Return by how much the probability of ``label`` falls where the image is covered: float32 (H, W), -1..1.

    Occlusion (Zeiler, Fergus 2014): a square a quarter of the image wide covers one place after the other, in the
    colour of the image's border; every pixel gets the mean over the squares that covered it. ``classify`` gives
    probabilities (N, K) of uint8 images (N, C, H, W); ``pixels`` is one, uint8 (C, H, W). It works for every net, also
    for one that cannot be differentiated.
    """
    _, height, width = pixels.shape
    side = max(min(height, width) // 4, 1)
    step = max(side // 3, 1)
    border = np.concatenate(
        [pixels[:, [0, -1]].reshape(len(pixels), -1), pixels[:, :, [0, -1]].reshape(len(pixels), -1)], 1
    )
    paper = np.median(border, axis=1).astype(np.uint8)[:, None, None]
    places = [
        (y, x)
        for y in sorted({*range(0, height - side, step), height - side})
        for x in sorted({*range(0, width - side, step), width - side})
    ]
    covered = np.repeat(pixels[None], len(places) + 1, axis=0)  # the last stays whole
    for image, (y, x) in zip(covered, places, strict=False):
        image[:, y : y + side, x : x + side] = paper
    probabilities = classify(covered)[:, label]
    total, count = np.zeros((2, height, width), np.float32)
    for (y, x), probability in zip(places, probabilities, strict=False):
        total[y : y + side, x : x + side] += probabilities[-1] - probability
        count[y : y + side, x : x + side] += 1
    return total / count
