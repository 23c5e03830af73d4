"""A net in whole numbers of 8 bits: an ONNX file of a third of the size, faster, and what that costs."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from convlens.data.dataset import Dataset
from convlens.evaluation.metrics import wilson_interval
from convlens.export.onnx import (
    assemble_model,
    export_net,
    read_metadata,
    reference_outputs,
    require_exporter,
    write_metadata,
)
from convlens.inference.bundle import load_bundle
from convlens.inference.onnx_runtime import OnnxPredictor, embed_digest

SHOWN = 512  # training images that the ranges of activations are taken from

TOGETHER = 64  # of them at a time


@dataclass(frozen=True)
class QuantizationCost:
    """What 8 bits change on the test split."""

    before: float  # accuracy, 0..1
    after: float
    same: float  # share of images with the same label
    n: int

    def __str__(self) -> str:
        return (
            f"test accuracy {self.after:.2%} instead of {self.before:.2%}; {self.same:.2%} of {self.n:,} labels alike"
        )


def build_int8(folder: Path, dataset: Dataset) -> tuple[Any, Any, QuantizationCost]:
    """Return the ONNX model of the bundle in ``folder`` with convolutions in 8 bits, the exact one, and what it costs.

    The range of each activation is that on some training images of ``dataset``. Golden answers and test figures in
    the file are those of the 8-bit net; temperature and bounds stay those of the exact one. Raises what
    ``build_onnx`` does.
    """
    require_exporter()
    bundle = load_bundle(folder)
    net = export_net(bundle.net, bundle.preprocess)
    g = torch.Generator().manual_seed(0)
    shown = dataset.train.images[torch.randperm(len(dataset.train), generator=g)[:SHOWN]]
    exact = assemble_model(net, bundle, folder)
    model = assemble_model(quantize(net, bundle.preprocess.normalizer()(shown).numpy()), bundle, folder)
    plain, small = (OnnxPredictor(embed_digest(m.SerializeToString()), str(folder)) for m in (exact, model))
    images, labels = dataset.test.images.numpy(), dataset.test.labels.numpy()
    first, second = (predictor.run(images)[0].argmax(axis=1) for predictor in (plain, small))
    n, right = len(labels), int((second == labels).sum())
    about = read_metadata(model)
    about["golden"] = reference_outputs(small)
    about["trained"] |= {"n": n, "accuracy": right / n, "accuracy_interval": wilson_interval(right, n), "bits": 8}
    write_metadata(model, about)
    return (
        model,
        exact,
        QuantizationCost(float((first == labels).mean()), right / n, float((first == second).mean()), n),
    )


def quantize(net: Any, images: NDArray[np.float32]) -> Any:
    """Return an ONNX net whose convolutions compute in 8 bits, with ranges as on ``images`` (N, C, H, W).

    Weights have a scale for each filter, and 7 of the 8 bits: with 8, processors without VNNI cut sums off, and answer
    otherwise than those that have it.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.parts = iter(np.array_split(images, max(len(images) // TOGETHER, 1)))

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            part = next(self.parts, None)
            return None if part is None else {"net_input": part}

    convolutions = [node.name for node in net.graph.node if node.op_type == "Conv"]
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "net.onnx", Path(folder) / "int8.onnx"
        onnx.save(net, before)
        logging.disable(logging.WARNING)  # advice for models that were not made for this
        try:
            quantize_static(
                before, after, Reader(), nodes_to_quantize=convolutions, per_channel=True, reduce_range=True,
                weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
            )  # fmt: skip
        finally:
            logging.disable(logging.NOTSET)
        return onnx.load(after)
