"""A training looked back at: what the net was at each snapshot, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from convlens.data.dataset import Split
from convlens.data.images import Pixels
from convlens.data.loader import count_batches
from convlens.errors import ConvlensError, UsageError
from convlens.evaluation.inference import compute_logits
from convlens.evaluation.metrics import MAX_DENSE_CLASSES, confusion_matrix
from convlens.explain.activations import feature_maps, first_convolution
from convlens.explain.explanation import Array, to_array
from convlens.explain.snapshots import list_snapshots, load_snapshot
from convlens.inference.classifier import Classifier
from convlens.run_dir import RunDir
from convlens.system.progress import track
from convlens.system.text import quoted

MAX_IMAGES = 2000  # images, at most, that every snapshot is asked about


@dataclass(frozen=True)
class SnapshotView:
    """The net as it was after so many steps."""

    step: int
    epoch: float  # epochs that were done; 0.25 is a quarter of the first
    kernels: Array  # of the first convolution, (C', C, k, k)
    maps: dict[str, Array]  # of the picture: stage -> (C', H', W')
    probabilities: Array  # of the picture, (K,), tempered as those of the finished net
    accuracy: float  # share of the images that it had right, 0..1
    confusion: NDArray[np.int64] | None  # (K, K): rows are true classes, columns predictions; None of over 100 classes


def replay(classifier: Classifier, folder: RunDir, pixels: Pixels, asked: Split) -> list[SnapshotView]:
    """Return what the net of a run was at each snapshot, the first first.

    ``pixels`` is the picture to follow, uint8 (C, H, W); ``asked`` are the images that every snapshot is tested on,
    2,000 of them at most. The classifier is left with the weights of the last snapshot. Raises UsageError if the run
    kept no snapshots, ConvlensError for one that cannot be read.
    """
    snapshots = list_snapshots(folder.snapshots)
    if not snapshots:
        raise UsageError(
            f"{folder.path} kept no snapshots; train with --save-snapshots, such as: convlens train "
            f"{quoted(folder.read_config()['data']['name'])} --save-snapshots"
        )
    config = folder.read_config()
    epoch_steps = count_batches(config["data"]["counts"]["train"], config["recipe"]["batch_size"])
    net, classes = classifier.net, len(classifier.classes)
    normalise = classifier.preprocess.normalizer()
    first = first_convolution(net)
    if first is None:
        raise ConvlensError("this net has no convolution: there is nothing to see in it")
    part = asked.select(asked.evenly_spaced(MAX_IMAGES))
    device = next(net.parameters()).device
    picture = torch.from_numpy(pixels)[None]
    x = normalise.to(device)(picture.to(device))
    moments = []
    for step, path in track(snapshots.items(), "looking back", len(snapshots)):
        load_snapshot(path, net)
        net.eval()
        guesses = compute_logits(net, part.images, normalise).argmax(dim=1).cpu()
        confusion = None
        if classes <= MAX_DENSE_CLASSES:
            confusion = confusion_matrix(part.labels, guesses, classes).numpy()
        moments.append(
            SnapshotView(
                step=step,
                epoch=step / epoch_steps,
                kernels=to_array(first.weight).copy(),
                maps={name: to_array(maps[0]) for name, maps in feature_maps(net, x).items()},
                probabilities=to_array(classifier.probabilities(classifier.logits(picture))[0]),
                accuracy=int((guesses == part.labels).sum()) / max(len(part), 1),
                confusion=confusion,
            )
        )
    return moments
