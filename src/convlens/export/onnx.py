"""Export a trained model as an ONNX graph from raw pixels to probabilities, label and in-distribution decision."""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from convlens.data.preprocess import Preprocess
from convlens.errors import ConvlensError
from convlens.export.onnx_ops import COLOR_GRAPHS, OOD_GRAPH, OUTPUT_GRAPH, PREPROCESS_GRAPH
from convlens.inference.bundle import Bundle, load_bundle
from convlens.inference.classifier import Classifier
from convlens.inference.metadata import BundleMetadata, OnnxGraphInfo
from convlens.inference.onnx_runtime import DIGEST_PLACEHOLDER, FORMAT, METADATA_KEY, OnnxPredictor, embed_digest
from convlens.inference.predictor import Predictor
from convlens.inference.store import GRAPH, UNCERTAINTY, WEIGHTS
from convlens.system.extras import missing_extra
from convlens.system.files import atomic_write

OPSET = 20  # the first with Gelu

MIN_EXTERNAL_BYTES = 64  # smaller tensors stay in the graph


def require_exporter() -> None:
    """Raise UsageError unless the packages of PyTorch's ONNX exporter are installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise missing_extra("ONNX export needs the extra `export`", "export") from None


class WithFeatures(nn.Module):
    """Wraps a model to return logits (N, K) and features (N, D), the spatial means of the last feature maps."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.net = model  # names of the initializers in exported graphs begin with this

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and features of normalized images (N, C, H, W)."""
        maps = self.net.features(x)  # type: ignore[operator]
        return self.net.head(maps), maps.mean(dim=(2, 3))  # type: ignore[operator]


def build_onnx(folder: Path) -> Any:
    """Export the bundle in a folder.

    Returns:
        The ONNX model, a protobuf, including its weights.

    Raises:
        UsageError: If the packages of the extra `export` are not installed.
        ConvlensError: If ONNX cannot represent the model.
    """
    require_exporter()
    bundle = load_bundle(folder)
    return assemble_model(export_module(bundle.model, bundle.preprocess), bundle, folder)


def assemble_model(module: Any, bundle: Bundle, folder: Path) -> Any:
    """Return the complete ONNX model: preprocessing, the exported ``module``, outputs and metadata."""
    import onnx
    from onnx import helper, numpy_helper, parser

    def graph(text: str) -> Any:
        return parser.parse_model(f'<ir_version: 10, opset_import: ["" : {OPSET}]>{text}').graph

    shape, uncertainty = bundle.preprocess, bundle.uncertainty
    constants, color = COLOR_GRAPHS[shape.channels]
    front = PREPROCESS_GRAPH.format(height=shape.height, width=shape.width, constants=constants, color=color)
    normalize = shape.normalizer()
    tensors: dict[str, Tensor] = {"scale": normalize.scale, "offset": normalize.offset}
    temperature = uncertainty.temperature if uncertainty else 1.0
    parts = [graph(front), module.graph, graph(OUTPUT_GRAPH.format(temperature=temperature))]
    if uncertainty is not None:
        parts.append(
            graph(
                OOD_GRAPH.format(
                    distance=uncertainty.distance, energy=uncertainty.energy, threshold=uncertainty.ood_threshold
                )
            )
        )
        tensors |= uncertainty.tensors()
    complete = helper.make_graph(
        [node for part in parts for node in part.node],
        "convlens",
        parts[0].input,
        [output for part in parts[2:] for output in part.output],
        [tensor for part in parts for tensor in part.initializer],
    )
    for name, value in tensors.items():
        complete.initializer.append(numpy_helper.from_array(value.numpy(), name))
    for node in complete.node:  # the exporter stores long stack traces
        del node.metadata_props[:]
        node.doc_string = ""
    model = helper.make_model(complete, opset_imports=module.opset_import, ir_version=10, producer_name="convlens")
    metadata = {
        "digest": DIGEST_PLACEHOLDER.decode(),
        "format": FORMAT,
        **describe_bundle(folder),
        "reference": reference_outputs(Classifier(bundle)),
    }
    write_metadata(model, metadata)
    onnx.checker.check_model(model)
    return model


def write_metadata(model: Any, metadata: dict[str, Any]) -> None:
    """Store our metadata in an ONNX model."""
    from onnx import helper

    helper.set_model_props(model, {METADATA_KEY: json.dumps(metadata, separators=(",", ":"))})


def read_metadata(model: Any) -> dict[str, Any]:
    """Return our metadata of an ONNX model."""
    return json.loads(next(entry.value for entry in model.metadata_props if entry.key == METADATA_KEY))  # type: ignore[no-any-return]


def export_module(model: nn.Module, shape: Preprocess) -> Any:
    """Return the ONNX model of a module, from ``model_input`` (N, C, H, W) to ``logits`` and ``features``.

    Raises:
        ConvlensError: If ONNX cannot represent the module.
    """
    from onnxscript import optimizer

    example = torch.zeros(2, shape.channels, shape.height, shape.width)
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                WithFeatures(model).eval(),
                (example,),
                input_names=["model_input"],
                output_names=["logits", "features"],
                dynamic_shapes=({0: torch.export.Dim("N")},),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,  # it would fold BatchNorm into the weights; ONNX Runtime does that anyway
                verbose=False,
            )
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ConvlensError(f"this model cannot be exported to ONNX: {reason}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    assert program is not None
    optimizer.fold_constants(program.model)
    optimizer.remove_unused_nodes(program.model)
    return program.model_proto


def describe_bundle(folder: Path) -> dict[str, Any]:
    """Return the metadata that an ONNX file takes from its bundle."""
    metadata = BundleMetadata.read(folder)
    training, uncertainty = metadata.training, metadata.uncertainty
    return {
        "classes": list(metadata.classes),
        "preprocess": metadata.preprocess.to_json(),
        "sha256": metadata.sha256,
        "conformal_thresholds": uncertainty["conformal_thresholds"] if uncertainty else None,
        "training": {
            "data": training["data"]["name"],
            "num_train_images": training["data"]["counts"]["train"],
            "model": metadata.architecture.name,
            "parameters": training["parameters"],
            **{key: training["test"][key] for key in ("num_images", "accuracy", "accuracy_ci95")},
        },
    }


def reference_outputs(predictor: Predictor) -> dict[str, Any]:
    """Return the reference images, uint8 (N, H, W, C) in base64, with the outputs of the predictor."""
    images = reference_images(predictor.preprocess)
    probabilities, in_distribution = predictor.run(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    encoded = base64.b64encode(images.tobytes()).decode()
    outputs: dict[str, Any] = {"shape": images.shape, "images": encoded, "probabilities": probabilities.tolist()}
    return outputs if in_distribution is None else {**outputs, "in_distribution": in_distribution.tolist()}


def reference_images(shape: Preprocess) -> NDArray[np.uint8]:
    """Return 8 synthetic images (N, H, W, C) of the model's input size: black, gray, noise, clouds and strokes."""
    g = np.random.default_rng(0)
    height, width, channels = shape.height, shape.width, shape.channels
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    black, gray = np.zeros((channels, height, width)), np.full((channels, height, width), 0.5)
    noise = g.uniform(size=(2, channels, height, width))
    frequencies = g.uniform(0, 2.5, (2, 2, channels, 4, 1, 1))
    phases, amplitudes = g.uniform(size=(2, channels, 4, 1, 1)), g.normal(size=(2, channels, 4, 1, 1))
    waves = np.sin(2 * np.pi * (frequencies[0] * x + frequencies[1] * y + phases)) * amplitudes
    clouds = waves.sum(axis=2) / 4 + 0.5
    slopes = np.array([0.0, 0.8])[:, None, None, None]  # a vertical and a slanting stroke
    strokes = np.exp(-(((x - 0.45 - slopes * (y - 0.5)) / 0.07) ** 2)) * (np.abs(y - 0.5) < 0.35)
    images = np.concatenate([black[None], gray[None], noise, clouds, strokes.repeat(channels, axis=1)])  # (8, C, H, W)
    return (images.clip(0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def add_graph(model: Any, folder: Path) -> None:
    """Add the ONNX graph to the bundle that it was exported from.

    The graph refers to the weights in the bundle's safetensors files (external data of ONNX), so it is small, and other
    programs can load it too. :func:`convlens.inference.onnx_runtime.load_predictor` uses it to predict without PyTorch.
    """
    from onnx.external_data_helper import set_external_data

    model = copy.deepcopy(model)
    locations = {
        content: location for file in (WEIGHTS, UNCERTAINTY) for content, location in tensors_in(folder / file)
    }
    external = {}
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) >= MIN_EXTERNAL_BYTES and tensor.raw_data in locations:
            key, file, offset = locations[tensor.raw_data]
            set_external_data(tensor, file, offset=offset, length=len(tensor.raw_data))
            tensor.ClearField("raw_data")
            external[tensor.name] = key
    content = embed_digest(model.SerializeToString())
    with atomic_write(folder / GRAPH) as temporary:
        temporary.write_bytes(content)
    graph = OnnxGraphInfo(hashlib.sha256(content).hexdigest(), external)
    replace(BundleMetadata.read(folder), onnx=graph).write(folder)


def tensors_in(path: Path) -> Iterator[tuple[bytes, tuple[str, str, int]]]:
    """Yield the tensors of a safetensors file: content, and (tensor name, file name, offset in bytes)."""
    if path.exists():
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":
                begin, end = (start + offset for offset in entry["data_offsets"])
                yield content[begin:end], (name, path.name, begin)


def write_onnx(model: Any, path: Path) -> float:
    """Write an ONNX model as one file, after verifying it; see :meth:`OnnxPredictor.verify`.

    Returns:
        The largest absolute error of a probability.

    Raises:
        ConvlensError: If the error is too large; nothing is written then.
    """
    content = embed_digest(model.SerializeToString())
    error = OnnxPredictor(content, str(path)).verify()
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    return error
