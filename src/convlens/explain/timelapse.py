"""Replay a training from its snapshots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from convlens.data.dataset import Split
from convlens.data.images import Pixels
from convlens.data.loader import count_batches
from convlens.errors import UsageError
from convlens.evaluation.inference import compute_logits
from convlens.evaluation.metrics import MAX_DENSE_CLASSES, confusion_matrix
from convlens.explain.activations import feature_maps
from convlens.explain.explanation import Array, require_convolution, to_array
from convlens.explain.snapshots import list_snapshots, load_snapshot
from convlens.inference.classifier import Classifier
from convlens.run_dir import RunDir
from convlens.system.progress import track
from convlens.system.text import quoted

MAX_IMAGES = 2000  # that every snapshot is evaluated on


@dataclass(frozen=True)
class SnapshotView:
    """The model at one snapshot."""

    step: int
    epoch: float  # finished epochs; 0.25 is a quarter of the first
    kernels: Array  # of the first convolution, (C', C, k, k)
    feature_maps: dict[str, Array]  # of the followed image: stage -> (C', H', W')
    probabilities: Array  # of the followed image, (K,); with the temperature of the final model
    accuracy: float  # on the evaluation images, 0..1
    confusion: NDArray[np.int64] | None  # (K, K): rows are true classes, columns predictions; None for many classes


def replay(classifier: Classifier, folder: RunDir, pixels: Pixels, split: Split) -> list[SnapshotView]:
    """Evaluate the snapshots of a run, in order.

    Args:
        classifier: The classifier of the run; the call leaves it with the weights of the last snapshot.
        folder: The run.
        pixels: The image to follow, uint8 (C, H, W).
        split: Every snapshot is evaluated on at most 2,000 of these images.

    Raises:
        UsageError: If the run has no snapshots.
        ConvlensError: If a snapshot cannot be read.
    """
    snapshots = list_snapshots(folder.snapshots)
    config = folder.read_config()
    if not snapshots:
        raise UsageError(
            f"{folder.path} has no snapshots; train with `save_snapshots`, for example: convlens train "
            f"{quoted(config['data']['name'])} --save-snapshots"
        )
    steps_per_epoch = count_batches(config["data"]["counts"]["train"], config["recipe"]["batch_size"])
    model, classes = classifier.model, len(classifier.classes)
    normalize = classifier.preprocess.normalizer()
    convolution = require_convolution(model)
    subset = split.select(split.evenly_spaced(MAX_IMAGES))
    device = next(model.parameters()).device
    image = torch.from_numpy(pixels)[None]
    x = normalize.to(device)(image.to(device))
    views = []
    for step, path in track(snapshots.items(), "replaying", len(snapshots)):
        load_snapshot(path, model)
        model.eval()
        predictions = compute_logits(model, subset.images, normalize).argmax(dim=1).cpu()
        confusion = None
        if classes <= MAX_DENSE_CLASSES:
            confusion = confusion_matrix(subset.labels, predictions, classes).numpy()
        views.append(
            SnapshotView(
                step=step,
                epoch=step / steps_per_epoch,
                kernels=to_array(convolution.weight).copy(),
                feature_maps={name: to_array(maps[0]) for name, maps in feature_maps(model, x).items()},
                probabilities=to_array(classifier.probabilities(classifier.logits(image))[0]),
                accuracy=int((predictions == subset.labels).sum()) / max(len(subset), 1),
                confusion=confusion,
            )
        )
    return views
