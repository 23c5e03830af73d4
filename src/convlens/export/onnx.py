"""A trained net as an ONNX graph that takes raw pixels and answers by itself, from their colours to "unknown"."""

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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convlens.data.preprocess import Preprocess
from convlens.errors import ConvlensError, UsageError
from convlens.export.onnx_ops import COLOR_GRAPHS, OOD_GRAPH, OUTPUT_GRAPH, PREPROCESS_GRAPH
from convlens.inference.bundle import Bundle, load_bundle
from convlens.inference.classifier import Classifier
from convlens.inference.onnx_runtime import DIGEST_PLACEHOLDER, FORMAT, METADATA, OnnxPredictor, embed_digest
from convlens.inference.predictor import Predictor
from convlens.inference.store import CONFIG, GRAPH, UNCERTAINTY, WEIGHTS
from convlens.system.files import atomic_write, read_json, write_json

OPSET = 20  # the first with GELU


def require_exporter() -> None:
    """Raise UsageError unless the packages that PyTorch's exporter takes are installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise UsageError("this needs two packages more: pip install 'convlens[export]'") from None


class WithFeatures(nn.Module):
    """A net that returns its logits (N, K) and its features (N, D), the means of the last spatial map."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and features of normalised images (N, C, H, W)."""
        maps = self.net.features(x)  # type: ignore[operator]
        return self.net.head(maps), maps.mean(dim=(2, 3))  # type: ignore[operator]


def build_onnx(folder: Path) -> Any:
    """Return the ONNX model, a protobuf, of the bundle in ``folder``, with all its weights inside.

    Raises UsageError where the packages that it takes are not installed, ConvlensError for a net that ONNX has no
    words for.
    """
    require_exporter()
    bundle = load_bundle(folder)
    return assemble_model(export_net(bundle.net, bundle.preprocess), bundle, folder)


def assemble_model(net: Any, bundle: Bundle, folder: Path) -> Any:
    """Return the ONNX model from raw pixels to an answer: what comes before the ``net``, that, and what follows."""
    import onnx
    from onnx import helper, numpy_helper, parser

    def graph(text: str) -> Any:
        return parser.parse_model(f'<ir_version: 10, opset_import: ["" : {OPSET}]>{text}').graph

    shape, trust = bundle.preprocess, bundle.trust
    constants_of_colour, colour = COLOR_GRAPHS[shape.channels]
    front = PREPROCESS_GRAPH.format(
        height=shape.height, width=shape.width, constants=constants_of_colour, colour=colour
    )
    normalise = shape.normalizer()
    constants: dict[str, Tensor] = {"scale": normalise.scale, "offset": normalise.offset}
    parts = [graph(front), net.graph, graph(OUTPUT_GRAPH.format(temperature=trust.temperature if trust else 1.0))]
    if trust is not None:
        spread = {"distance": trust.distance, "energy": trust.energy, "threshold": trust.threshold}
        parts.append(graph(OOD_GRAPH.format(**spread)))
        constants |= trust.tensors()
    whole = helper.make_graph(
        [node for part in parts for node in part.node],
        "convlens",
        parts[0].input,
        [output for part in parts[2:] for output in part.output],
        [tensor for part in parts for tensor in part.initializer],
    )
    for name, value in constants.items():
        whole.initializer.append(numpy_helper.from_array(value.numpy(), name))
    for node in whole.node:  # the exporter's notes say where in PyTorch each node comes from, at length
        del node.metadata_props[:]
        node.doc_string = ""
    model = helper.make_model(whole, opset_imports=net.opset_import, ir_version=10, producer_name="convlens")
    about = {
        "seal": DIGEST_PLACEHOLDER.decode(),
        "format": FORMAT,
        **describe_bundle(folder),
        "golden": reference_outputs(Classifier(bundle)),
    }
    write_metadata(model, about)
    onnx.checker.check_model(model)
    return model


def write_metadata(model: Any, about: dict[str, Any]) -> None:
    """Let a model say ``about`` itself."""
    from onnx import helper

    helper.set_model_props(model, {METADATA: json.dumps(about, separators=(",", ":"))})


def read_metadata(model: Any) -> dict[str, Any]:
    """Return what a model says of itself."""
    return json.loads(next(entry.value for entry in model.metadata_props if entry.key == METADATA))  # type: ignore[no-any-return]


def export_net(net: nn.Module, shape: Preprocess) -> Any:
    """Return the ONNX of a net, from normalised images (N, C, H, W), ``net_input``, to ``logits`` and ``features``."""
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
                WithFeatures(net).eval(),
                (example,),
                input_names=["net_input"],
                output_names=["logits", "features"],
                dynamic_shapes=({0: torch.export.Dim("N")},),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,  # it would mix BatchNorm into the weights, as what runs the graph does anyway
                verbose=False,
            )
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ConvlensError(f"this net cannot be exported to ONNX: {reason}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    assert program is not None
    optimizer.fold_constants(program.model)
    optimizer.remove_unused_nodes(program.model)
    return program.model_proto


def describe_bundle(folder: Path) -> dict[str, Any]:
    """Return what the file says of the bundle: all that predicting takes but the graph, and what it was trained on."""
    config = read_json(folder / CONFIG)
    kept = ("classes", "preprocess", "sha256")
    trained = config["trained"]
    about = {
        "data": trained["data"]["name"],
        "images": trained["data"]["counts"]["train"],
        "net": config["model"]["name"],
        "parameters": trained["parameters"],
        **{key: trained["test"][key] for key in ("n", "accuracy", "accuracy_interval")},
    }
    bounds = config["trust"]["bounds"] if "trust" in config else None
    return {**{key: config[key] for key in kept}, "bounds": bounds, "trained": about}


def reference_outputs(predictor: Predictor) -> dict[str, Any]:
    """Return made-up images, uint8 (N, H, W, C) in base64, and what is said of them."""
    images = reference_images(predictor.preprocess)
    probabilities, known = predictor.run(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    encoded = base64.b64encode(images.tobytes()).decode()
    answers: dict[str, Any] = {"shape": images.shape, "images": encoded, "probabilities": probabilities.tolist()}
    return answers if known is None else {**answers, "known": known.tolist()}


def reference_images(shape: Preprocess) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return 8 images (N, H, W, C) of a net's size: black, grey, noise, clouds, strokes. Nobody's own pictures."""
    g = np.random.default_rng(0)
    height, width, channels = shape.height, shape.width, shape.channels
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    black, grey = np.zeros((channels, height, width)), np.full((channels, height, width), 0.5)
    noise = g.uniform(size=(2, channels, height, width))
    turns = g.uniform(0, 2.5, (2, 2, channels, 4, 1, 1))
    starts, heights = g.uniform(size=(2, channels, 4, 1, 1)), g.normal(size=(2, channels, 4, 1, 1))
    waves = np.sin(2 * np.pi * (turns[0] * x + turns[1] * y + starts)) * heights
    clouds = waves.sum(axis=2) / 4 + 0.5
    slopes = np.array([0.0, 0.8])[:, None, None, None]  # a stroke, and a slanting one
    strokes = np.exp(-(((x - 0.45 - slopes * (y - 0.5)) / 0.07) ** 2)) * (np.abs(y - 0.5) < 0.35)
    images = np.concatenate([black[None], grey[None], noise, clouds, strokes.repeat(channels, axis=1)])  # (8, C, H, W)
    return (images.clip(0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def add_graph(model: Any, folder: Path) -> None:
    """Add an ONNX model to the bundle that it was made of: a graph without weights, which stay where they are.

    So it takes little room, and what predicts without PyTorch finds it. Other programs can load it too: the weights
    are external data of ONNX, at their places in the bundle's safetensors files.
    """
    from onnx.external_data_helper import set_external_data

    model = copy.deepcopy(model)
    places = {tensor: place for file in (WEIGHTS, UNCERTAINTY) for tensor, place in tensor_places(folder / file)}
    outside = {}
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) >= 64 and tensor.raw_data in places:
            key, location, offset = places[tensor.raw_data]
            set_external_data(tensor, location, offset=offset, length=len(tensor.raw_data))
            tensor.ClearField("raw_data")
            outside[tensor.name] = key
    content = embed_digest(model.SerializeToString())
    with atomic_write(folder / GRAPH) as temporary:
        temporary.write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    write_json(folder / CONFIG, {**read_json(folder / CONFIG), "onnx": {"sha256": sha256, "outside": outside}})


def tensor_places(path: Path) -> Iterator[tuple[bytes, tuple[str, str, int]]]:
    """Yield of each tensor in a safetensors file its bytes, and its name, the file's name, where it begins there."""
    if path.exists():
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, about in json.loads(content[8:start]).items():
            if name != "__metadata__":
                begin, end = (start + offset for offset in about["data_offsets"])
                yield content[begin:end], (name, path.name, begin)


def write_onnx(model: Any, path: Path) -> float:
    """Write an ONNX model as one file; return how far its answers are off, see OnnxPredictor.verify.

    Raises ConvlensError if that is too far: then nothing is written.
    """
    content = embed_digest(model.SerializeToString())
    drift = OnnxPredictor(content, str(path)).verify()
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    return drift
