"""All that can be seen of one answer of a net, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from convlens.data.dataset import Dataset
from convlens.data.images import Pixels
from convlens.errors import ConvlensError, UnknownNameError
from convlens.evaluation.inference import compute_outputs
from convlens.explain.activations import (
    ReceptiveField,
    feature_maps,
    first_convolution,
    get_stage,
    in_use,
    most_active_unit,
    receptive_field,
    recording,
)
from convlens.explain.cam import class_activation_map
from convlens.explain.occlusion import Heat, occlusion_map
from convlens.inference.classifier import Classifier
from convlens.inference.predictor import Prediction

Array = NDArray[np.float32]
NEIGHBORS = 8
MAX_NEIGHBOR_CANDIDATES = 2000  # training images, at most: enough to find something alike, and soon done


@dataclass(frozen=True)
class Neighbor:
    """A training image that the net finds much like the picture."""

    image: Pixels  # uint8 (C, H, W)
    label: str
    similarity: float  # cosine between the features, -1..1
    id: str


@dataclass(frozen=True)
class Explanation:
    """What a net says of a picture, and why, as far as it can be seen. Arrays are float32 where nothing else is said.

    ``occlusion``: what the class loses in probability where a place is covered (Zeiler, Fergus 2014). ``activations``:
    class activation maps (HiResCAM; Draelos, Carin 2020). ``units``: measured receptive fields. ``pooled``: keys
    "whole", "max" and "average".
    """

    pixels: Pixels  # uint8 (C, H, W): what the net gets
    prediction: Prediction
    label: str  # the class that the heat maps are about
    maps: dict[str, Array]  # stage -> (C', H', W')
    kernels: Array  # of the first convolution, (C', C, k, k)
    occlusion: Heat  # (H, W), -1..1; see occlusion_map
    activations: dict[str, Heat]  # stage -> class activation map, (H, W), 0..1; the last is the one that is usual
    units: dict[str, ReceptiveField]  # stage -> its loudest unit, or the one that was asked for, and what it sees
    pooled: dict[str, Array]  # the first convolution's loudest map: "whole", its blocks of 2x2 by "max" and "average"
    neighbours: tuple[Neighbor, ...]  # the most alike first; empty without the training images


class TrainingImages:
    """Images that a net was trained on, and their features, to find those that are like a picture.

    ``dataset`` is without what was held out for validation.
    """

    def __init__(self, classifier: Classifier, dataset: Dataset):
        split = dataset.train
        self.dataset = dataset
        self.rows = split.evenly_spaced(MAX_NEIGHBOR_CANDIDATES)
        _, features = compute_outputs(classifier.net, split.images[self.rows], classifier.preprocess.normalizer())
        self.features = F.normalize(features, dim=1)  # (N, D)

    def like(self, features: Tensor) -> tuple[Neighbor, ...]:
        """Return the training images whose features are most like ``features`` (D,)."""
        split = self.dataset.train
        values, places = (self.features @ F.normalize(features, dim=0)).topk(min(NEIGHBORS, len(self.rows)))
        return tuple(
            Neighbor(split.images[row].numpy(), self.dataset.classes[int(split.labels[row])], value, split.ids[row])
            for row, value in zip(self.rows[places.cpu()].tolist(), values.tolist(), strict=True)
        )


def explain(
    classifier: Classifier,
    pixels: Pixels,
    *,
    label: str | None = None,
    unit: tuple[str, int, int, int] | None = None,
    training: TrainingImages | None = None,
) -> Explanation:
    """Return all that can be seen of what the net says of one image, uint8 (C, H, W) as ``Classifier.adapt`` gives it.

    ``label`` is the class that the heat maps are about, by default the predicted one; ``unit`` (stage, channel, y, x) a
    unit whose receptive field is shown, instead of the stage's loudest. ``training`` finds training images like it.
    Works with every net that keeps the model contract. Raises UnknownNameError for an unknown class or stage,
    UsageError for a unit that the stage has not, ConvlensError for a net without a convolution.
    """
    net = classifier.net
    if label is not None:
        require_class(label, classifier.classes)
    if unit is not None:
        get_stage(net, unit[0])
    (prediction,) = classifier.describe([pixels], top=len(classifier.classes))
    about = label or prediction.label
    number = classifier.classes.index(about)
    device = next(net.parameters()).device
    x = classifier.preprocess.normalizer().to(device)(torch.from_numpy(pixels)[None].to(device))  # (1, C, H, W)
    first = first_convolution(net)
    if first is None:
        raise ConvlensError("this net has no convolution: there is nothing to see in it")
    with torch.no_grad(), in_use(net), recording({"first": first}) as outputs:
        maps = {name: output[0] for name, output in feature_maps(net, x).items()}
        features = net.features(x)[0].mean(dim=(1, 2))
    response = outputs["first"][0]  # (C', H', W')
    loudest = response[most_active_unit(response)[0]][None]  # (1, H', W')
    units = {name: most_active_unit(output) for name, output in maps.items()}
    if unit is not None:
        units[unit[0]] = unit[1:]
    shape = (pixels.shape[0], pixels.shape[1], pixels.shape[2])
    return Explanation(
        pixels=pixels,
        prediction=prediction,
        label=about,
        maps={name: to_array(output) for name, output in maps.items()},
        kernels=to_array(first.weight),
        occlusion=occlusion_map(lambda images: classifier.run(images)[0], pixels, number),
        activations={name: to_array(class_activation_map(net, x, number, name)[0]) for name in maps},
        units={name: receptive_field(net, name, place, shape) for name, place in units.items()},
        pooled={
            "whole": to_array(loudest[0]),
            "max": to_array(F.max_pool2d(loudest, 2, ceil_mode=True)[0]),
            "average": to_array(F.avg_pool2d(loudest, 2, ceil_mode=True)[0]),
        },
        neighbours=training.like(features) if training else (),
    )


def require_class(label: str, classes: tuple[str, ...]) -> None:
    """Raise UnknownNameError unless there is a class of that name."""
    if label not in classes:
        raise UnknownNameError("class", str(label), classes)


def to_array(x: Tensor) -> Array:
    """Return a tensor as a NumPy array of 32-bit floats."""
    return x.detach().float().cpu().numpy()
