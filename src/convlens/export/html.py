"""Export a trained model as the playground: one HTML page that runs the model in any browser, offline."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convlens.data.images import Pixels
from convlens.errors import ConvlensError
from convlens.inference.onnx_runtime import OnnxPredictor
from convlens.web.render import read_static, render

MAX_EXACT_VALUES = 256  # larger tensors are stored as 16-bit integers, with one scale per row

SPATIAL_AXES = ({2, 3}, {-2, -1})  # the axes that a pooling head may reduce

SCRIPTS = ("canvas.js", "inference.js", "preprocess.js", "playground.js")


def render_playground(
    predictor: OnnxPredictor,
    samples: Sequence[tuple[str, Pixels]] = (),
    current: str = "",
    models: Sequence[str] = (),
) -> str:
    """Render the playground of a model.

    Args:
        predictor: The model.
        samples: Images to try: class names, and pixels uint8 (C, H, W).
        current: On a server, the name of this model.
        models: On a server, the names of all models; the page links to theirs.

    Returns:
        The page as HTML.

    Raises:
        UsageError: If the packages of the extra `export` are not installed.
        ConvlensError: If the model is quantized, or has a layer that the page cannot compute.
    """
    if predictor.is_quantized:
        raise ConvlensError("the page cannot run int8 models; export the float32 model, without `int8`")
    metadata = predictor.metadata
    model, weights = describe_model(predictor.to_onnx())
    model |= {key: metadata[key] for key in ("classes", "preprocess", "reference", "training")}
    model["samples"] = [
        {"label": label, "pixels": base64.b64encode(pixels.tobytes()).decode()} for label, pixels in samples
    ]
    model |= {"current": current, "models": list(models)}
    parts = {
        "TITLE": html.escape(f"{metadata['training']['data']}: a small neural network at work"),
        "STYLE": read_static("playground.css"),
        "SCRIPT": "".join(map(read_static, SCRIPTS)),
        "MODEL": json.dumps(model, separators=(",", ":")).replace("<", "\\u003c"),
        "WEIGHTS": weights,
    }
    return render("playground.html", parts)


def describe_model(model: Any) -> tuple[dict[str, Any], str]:
    """Return an ONNX model for ``inference.js``: layers, steps and small tensors; and the large tensors in base64."""
    from onnx import helper, numpy_helper

    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            value = helper.get_attribute_value(node.attribute[0])
            is_tensor = node.attribute[0].name == "value"
            constants[node.output[0]] = numpy_helper.to_array(value) if is_tensor else np.array(value)
    layers = list_layers(model.graph, constants)
    uncertainty = None
    if "ood_threshold" in constants:
        constants["centers"] = constants["means"] @ constants["whitener"]
        uncertainty = {
            key: [constants[f"{key}_mean"].item(), constants[f"{key}_std"].item()] for key in ("distance", "energy")
        }
        uncertainty["ood_threshold"] = constants["ood_threshold"].item()
    used = {name for layer in layers for name in layer["inputs"]} | {"whitener", "centers"}
    tensors, packed = pack({name: value for name, value in constants.items() if name in used})
    last_map = next(layer["inputs"][0] for layer in layers if layer["output"] == "features")
    description = {
        "layers": layers,
        "steps": list_steps(layers, last_map),
        "last_map": last_map,
        "tensors": tensors,
        "temperature": constants["temperature"].item(),
        "uncertainty": uncertainty,
    }
    return description, base64.b64encode(packed).decode()


def list_layers(graph: Any, constants: dict[str, NDArray[Any]]) -> list[dict[str, Any]]:
    """Return the layers from ``model_input`` to ``logits`` and ``features`` as ``inference.js`` takes them.

    BatchNorm layers become affine ones; their factors and offsets are added to ``constants``.

    Raises:
        ConvlensError: If ``inference.js`` does not have a layer.
    """
    from onnx import helper

    layers: list[dict[str, Any]] = []
    computed, aliases = {"model_input"}, dict[str, str]()
    for node in graph.node:
        if {"logits", "features"} <= computed:
            break  # the rest of the graph computes the outputs from these
        inputs = [aliases.get(name, name) for name in node.input]
        if not (set(inputs) & computed) or node.op_type == "Shape":
            continue  # part of the preprocessing, or a computation of shapes, which are fixed in the page
        if node.op_type in ("Identity", "Dropout"):
            aliases[node.output[0]] = inputs[0]
            continue
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        layers.append(convert_layer(node, inputs, attributes, constants, computed))
        computed.add(node.output[0])
    return layers


def convert_layer(
    node: Any, inputs: list[str], attributes: dict[str, Any], constants: dict[str, NDArray[Any]], computed: set[str]
) -> dict[str, Any]:
    """Return one layer; see :func:`list_layers`. ``computed`` are the values that depend on the image."""
    layer: dict[str, Any] = {"op": node.op_type, "inputs": inputs, "output": node.output[0]}
    axes = set(constants[inputs[1]].tolist()) if node.op_type.startswith("Reduce") and len(inputs) > 1 else None
    window = {"pads": attributes.get("pads", [0] * 4), "strides": attributes.get("strides", [1, 1])}
    undilated = set(attributes.get("dilations", [1])) == {1}
    match node.op_type:
        case "Conv" if attributes.get("group", 1) == 1 and undilated:
            layer |= window
        case "MaxPool" if not attributes.get("ceil_mode") and undilated:
            layer |= {**window, "kernel": attributes["kernel_shape"]}
        case "AveragePool" if not attributes.get("ceil_mode") and undilated and not any(window["pads"]):
            layer |= {**window, "kernel": attributes["kernel_shape"]}
        case "BatchNormalization":
            weight, bias, mean, variance = (constants[name].astype(np.float64) for name in inputs[1:5])
            factor = weight / np.sqrt(variance + attributes.get("epsilon", 1e-5))
            names = [f"{node.output[0]}.{part}" for part in ("factor", "offset")]
            constants |= dict(zip(names, (factor, bias - mean * factor), strict=True))
            layer |= {"op": "Affine", "inputs": [inputs[0], *names]}
        case "Relu" | "LogSoftmax":
            pass
        case "Add" if set(inputs) <= computed:  # a residual connection
            pass
        case "Gelu" if attributes.get("approximate", b"none") == b"none":
            pass
        case "ReduceMax" | "ReduceMean" if axes in SPATIAL_AXES:
            layer["inputs"] = inputs[:1]
        case "GlobalMaxPool" | "GlobalAveragePool":
            layer["op"] = "ReduceMax" if node.op_type == "GlobalMaxPool" else "ReduceMean"
        case "Reshape" | "Flatten":
            layer |= {"op": "Reshape", "inputs": inputs[:1]}
        case "Gemm" if attributes.get("transB") == 1 and not attributes.get("transA"):
            pass
        case name:
            raise ConvlensError(f"the page cannot compute {name} with the options of this model; ONNX can")
    return layer


def list_steps(layers: list[dict[str, Any]], last_map: str) -> list[dict[str, Any]]:
    """Return the steps that the page shows: every convolution, and every pooling.

    The maps of a convolution are shown after its activation, unless a pooling comes in between. A convolution in a
    shortcut is shown as part of the sum.
    """
    summed = {name for layer in layers if layer["op"] == "Add" for name in layer["inputs"]}
    linear = {layer["output"] for layer in layers if layer["op"] in ("Conv", "Affine")}
    steps: list[dict[str, Any]] = []
    for layer in layers:
        pooled = layer["op"] in ("MaxPool", "AveragePool")
        if layer["op"] == "Conv" or pooled:
            steps.append({"pooled": pooled})
        if steps:
            steps[-1]["output"] = layer["output"]
        if layer["output"] == last_map:
            break
    return [step for step in steps if step["output"] not in summed & linear]


def pack(constants: dict[str, NDArray[Any]]) -> tuple[dict[str, dict[str, Any]], bytes]:
    """Pack tensors for the page.

    A row (an output channel) of a large tensor is scaled so that its largest absolute value becomes 32767: the rounding
    error is at most 1 / 65534 of that value.

    Returns:
        The descriptions of the tensors, small ones with their values, and the large ones as 16-bit integers.
    """
    described, chunks, offset = {}, [], 0
    for name, value in constants.items():
        entry: dict[str, Any] = {"shape": list(value.shape)}
        described[name] = entry
        if value.size <= MAX_EXACT_VALUES:
            entry["values"] = [float(f"{number:.9g}") for number in value.ravel().tolist()]
            continue
        rows = value.reshape(len(value), -1).astype(np.float64)
        scales = np.maximum(np.abs(rows).max(axis=1), 1e-30) / 32767
        chunks.append(np.round(rows / scales[:, None]).astype("<i2").tobytes())
        entry |= {"offset": offset, "scales": [float(f"{scale:.9g}") for scale in scales.tolist()]}
        offset += value.size
    return described, b"".join(chunks)
