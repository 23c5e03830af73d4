"""Explanations of one prediction, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from convlens.data.dataset import Dataset
from convlens.data.images import Pixels
from convlens.errors import ConvlensError, UnknownNameError
from convlens.evaluation.inference import compute_outputs
from convlens.explain.activations import (
    ReceptiveField,
    eval_mode,
    feature_maps,
    first_convolution,
    get_stage,
    most_active_unit,
    receptive_field,
    record_outputs,
)
from convlens.explain.cam import class_activation_map
from convlens.explain.occlusion import Heatmap, occlusion_map
from convlens.inference.classifier import Classifier
from convlens.inference.predictor import Prediction

Array = NDArray[np.float32]

NUM_NEIGHBORS = 8

MAX_NEIGHBOR_CANDIDATES = 2000  # training images that are searched: enough to find similar ones, and quick


@dataclass(frozen=True)
class Neighbor:
    """A training image with similar features."""

    image: Pixels  # uint8 (C, H, W)
    label: str
    similarity: float  # cosine similarity of the features, -1..1
    id: str


@dataclass(frozen=True)
class Explanation:
    """A prediction and what it depends on. Arrays are float32 unless stated otherwise.

    Attributes:
        pixels: The input of the model, uint8 (C, H, W).
        prediction: The prediction, with all classes in ``top``.
        label: The class that the heatmaps explain.
        feature_maps: Stage -> feature maps (C', H', W').
        kernels: Kernels of the first convolution, (C', C, k, k).
        occlusion: Occlusion map of the class, (H, W), -1..1 (Zeiler & Fergus 2014).
        cams: Stage -> class activation map, (H, W), 0..1 (HiResCAM; Draelos & Carin 2020). The last one is the usual
            one.
        receptive_fields: Stage -> measured receptive field of its most active unit, or of the requested one.
        pooling_demo: The most active map of the first convolution, and the same in blocks of 2 x 2: keys "original",
            "max" and "average".
        nearest_training_images: The most similar first; empty without the training images.
    """

    pixels: Pixels
    prediction: Prediction
    label: str
    feature_maps: dict[str, Array]
    kernels: Array
    occlusion: Heatmap
    cams: dict[str, Heatmap]
    receptive_fields: dict[str, ReceptiveField]
    pooling_demo: dict[str, Array]
    nearest_training_images: tuple[Neighbor, ...]


class TrainingImages:
    """The features of training images, to search for similar ones."""

    def __init__(self, classifier: Classifier, dataset: Dataset):
        """Compute the features.

        Args:
            classifier: The classifier that was trained on the images.
            dataset: Its data, without the validation images.
        """
        split = dataset.train
        self.dataset = dataset
        self.rows = split.evenly_spaced(MAX_NEIGHBOR_CANDIDATES)
        _, features = compute_outputs(classifier.model, split.images[self.rows], classifier.preprocess.normalizer())
        self.features = F.normalize(features, dim=1)  # (N, D)

    def nearest(self, features: Tensor) -> tuple[Neighbor, ...]:
        """Return the training images whose features are the most similar to ``features`` (D,)."""
        split = self.dataset.train
        values, indices = (self.features @ F.normalize(features, dim=0)).topk(min(NUM_NEIGHBORS, len(self.rows)))
        return tuple(
            Neighbor(split.images[row].numpy(), self.dataset.classes[int(split.labels[row])], value, split.ids[row])
            for row, value in zip(self.rows[indices.cpu()].tolist(), values.tolist(), strict=True)
        )


def explain(
    classifier: Classifier,
    pixels: Pixels,
    *,
    label: str | None = None,
    unit: tuple[str, int, int, int] | None = None,
    training: TrainingImages | None = None,
) -> Explanation:
    """Explain the prediction for one image. Works with every model that :func:`convlens.models.check_model` accepts.

    Args:
        classifier: The classifier.
        pixels: The image, uint8 (C, H, W), as :meth:`Classifier.adapt` returns it.
        label: The class to explain; by default the predicted one.
        unit: Stage, channel, y and x of the unit to measure the receptive field of, instead of the most active one.
        training: The training images to search for similar ones.

    Raises:
        UnknownNameError: If there is no such class or stage.
        UsageError: If the stage has no such unit.
        ConvlensError: If the model has no convolution.
    """
    model = classifier.model
    if label is not None:
        require_class(label, classifier.classes)
    if unit is not None:
        get_stage(model, unit[0])
    (prediction,) = classifier.describe([pixels], top=len(classifier.classes))
    explained = label or prediction.label
    index = classifier.classes.index(explained)
    device = next(model.parameters()).device
    x = classifier.preprocess.normalizer().to(device)(torch.from_numpy(pixels)[None].to(device))  # (1, C, H, W)
    convolution = require_convolution(model)
    with torch.no_grad(), eval_mode(model), record_outputs({"first": convolution}) as outputs:
        maps = {name: output[0] for name, output in feature_maps(model, x).items()}
        features = model.features(x)[0].mean(dim=(1, 2))
    response = outputs["first"][0]  # (C', H', W')
    units = {name: most_active_unit(output) for name, output in maps.items()}
    if unit is not None:
        units[unit[0]] = unit[1:]
    shape = (pixels.shape[0], pixels.shape[1], pixels.shape[2])
    return Explanation(
        pixels=pixels,
        prediction=prediction,
        label=explained,
        feature_maps={name: to_array(output) for name, output in maps.items()},
        kernels=to_array(convolution.weight),
        occlusion=occlusion_map(lambda images: classifier.run(images)[0], pixels, index),
        cams={name: to_array(class_activation_map(model, x, index, name)[0]) for name in maps},
        receptive_fields={name: receptive_field(model, name, place, shape) for name, place in units.items()},
        pooling_demo=demonstrate_pooling(response[most_active_unit(response)[0]]),
        nearest_training_images=training.nearest(features) if training else (),
    )


def demonstrate_pooling(feature_map: Tensor) -> dict[str, Array]:
    """Return a feature map (H, W) as it is, and pooled in blocks of 2 x 2 by maximum and by average."""
    batch = feature_map[None]
    return {
        "original": to_array(feature_map),
        "max": to_array(F.max_pool2d(batch, 2, ceil_mode=True)[0]),
        "average": to_array(F.avg_pool2d(batch, 2, ceil_mode=True)[0]),
    }


def require_convolution(model: nn.Module) -> nn.Conv2d:
    """Return the first convolution of a model; raise ConvlensError if it has none."""
    convolution = first_convolution(model)
    if convolution is None:
        raise ConvlensError("this model has no convolution: there is nothing to show")
    return convolution


def require_class(label: str, classes: tuple[str, ...]) -> None:
    """Raise UnknownNameError unless ``label`` is one of the classes."""
    if label not in classes:
        raise UnknownNameError("class", str(label), classes)


def to_array(x: Tensor) -> Array:
    """Return a tensor as a float32 array."""
    return x.detach().float().cpu().numpy()
