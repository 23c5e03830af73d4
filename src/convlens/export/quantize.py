"""Static int8 quantization of ONNX models, and its cost in accuracy."""

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
    export_module,
    read_metadata,
    reference_outputs,
    require_exporter,
    write_metadata,
)
from convlens.inference.bundle import load_bundle
from convlens.inference.onnx_runtime import OnnxPredictor, embed_digest

CALIBRATION_IMAGES = 512  # training images that the activation ranges are measured on

CALIBRATION_BATCH_SIZE = 64


@dataclass(frozen=True)
class QuantizationCost:
    """What quantization changes on the test split."""

    before: float  # accuracy in float32, 0..1
    after: float  # accuracy in int8, 0..1
    agreement: float  # fraction of images with the same predicted label, 0..1
    num_images: int

    def __str__(self) -> str:
        return (
            f"test accuracy {self.after:.2%} instead of {self.before:.2%}; "
            f"{self.agreement:.2%} of {self.num_images:,} labels agree"
        )


def build_int8(folder: Path, dataset: Dataset) -> tuple[Any, Any, QuantizationCost]:
    """Export the bundle in a folder with int8 convolutions.

    Temperature, conformal thresholds and out-of-distribution threshold stay those of the float32 model; reference
    outputs and test metrics in the file are those of the int8 model.

    Args:
        folder: The bundle's folder.
        dataset: The activation ranges are measured on its training split, the cost on its test split.

    Returns:
        The int8 model and the float32 model, both protobufs, and the cost of quantization.

    Raises:
        UsageError: If the packages of the extra `export` are not installed.
        ConvlensError: If ONNX cannot represent the model.
    """
    require_exporter()
    bundle = load_bundle(folder)
    module = export_module(bundle.model, bundle.preprocess)
    g = torch.Generator().manual_seed(0)
    calibration = dataset.train.images[torch.randperm(len(dataset.train), generator=g)[:CALIBRATION_IMAGES]]
    float32 = assemble_model(module, bundle, folder)
    quantized = quantize(module, bundle.preprocess.normalizer()(calibration).numpy())
    int8 = assemble_model(quantized, bundle, folder)
    reference, predictor = (OnnxPredictor(embed_digest(m.SerializeToString()), str(folder)) for m in (float32, int8))
    images, labels = dataset.test.images.numpy(), dataset.test.labels.numpy()
    before, after = (one.run(images)[0].argmax(axis=1) for one in (reference, predictor))
    n, correct = len(labels), int((after == labels).sum())
    metadata = read_metadata(int8)
    metadata["reference"] = reference_outputs(predictor)
    interval = wilson_interval(correct, n)
    metadata["training"] |= {"num_images": n, "accuracy": correct / n, "accuracy_ci95": interval, "bits": 8}
    write_metadata(int8, metadata)
    cost = QuantizationCost(float((before == labels).mean()), correct / n, float((before == after).mean()), n)
    return int8, float32, cost


def quantize(module: Any, images: NDArray[np.float32]) -> Any:
    """Return an ONNX model with int8 convolutions.

    Weights have one scale per filter and use only 7 bits (`reduce_range`), because CPUs without VNNI saturate 8-bit dot
    products and would give different results.

    Args:
        module: The ONNX model, with input ``model_input``.
        images: Normalized images (N, C, H, W) to measure the activation ranges on.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(np.array_split(images, max(len(images) // CALIBRATION_BATCH_SIZE, 1)))

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"model_input": batch}

    convolutions = [node.name for node in module.graph.node if node.op_type == "Conv"]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        onnx.save(module, source)
        logging.disable(logging.WARNING)  # advice that does not apply to our models
        try:
            quantize_static(
                source, target, Reader(), nodes_to_quantize=convolutions, per_channel=True, reduce_range=True,
                weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
            )  # fmt: skip
        finally:
            logging.disable(logging.NOTSET)
        return onnx.load(target)
