"""The html twin: one page that holds a trained net and runs it in any browser, with no network."""

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

SMALL = 256  # numbers; longer tensors are kept as 16-bit whole numbers, with a scale for each row

SPACE = ({2, 3}, {-2, -1})  # the axes that a pooling head may reduce


def render_playground(
    predictor: OnnxPredictor, samples: Sequence[tuple[str, Pixels]] = (), here: str = "", nets: Sequence[str] = ()
) -> str:
    """Return the page of a net as HTML, with ``samples`` to try: classes, and images uint8 (C, H, W).

    On a server, it is the page of the net called ``here``, with links to those of the other ``nets``.

    Raises UsageError where the package that it takes is not installed, ConvlensError for a net with a layer that the
    page cannot compute.
    """
    if predictor.in_8_bits:
        raise ConvlensError("the page cannot compute in 8 bits; it is for the same net without --int8")
    about = predictor.about
    model, weights = describe_model(predictor.model())
    model |= {key: about[key] for key in ("classes", "preprocess", "golden", "trained")}
    model["samples"] = [
        {"label": label, "pixels": base64.b64encode(pixels.tobytes()).decode()} for label, pixels in samples
    ]
    model |= {"here": here, "nets": list(nets)}
    parts = {name: read_static(name) for name in ("paint.js", "engine.js", "picture.js", "page.js", "page.css")}
    fill = {
        "TITLE": html.escape(f"{about['trained']['data']}: a small net at work"),
        "STYLE": parts["page.css"],
        "SCRIPT": parts["paint.js"] + parts["engine.js"] + parts["picture.js"] + parts["page.js"],
        "MODEL": json.dumps(model, separators=(",", ":")).replace("<", "\\u003c"),
        "WEIGHTS": weights,
    }
    return render("page.html", fill)


def describe_model(model: Any) -> tuple[dict[str, Any], str]:
    """Return an ONNX model for the page's engine: layers, steps and small tensors as plain values, others in base64."""
    from onnx import helper, numpy_helper

    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            value = helper.get_attribute_value(node.attribute[0])
            is_tensor = node.attribute[0].name == "value"
            constants[node.output[0]] = numpy_helper.to_array(value) if is_tensor else np.array(value)
    layers = list_layers(model.graph, constants)
    trust = None
    if "threshold" in constants:  # what the engine measures strangeness with
        constants["centres"] = constants["means"] @ constants["whitener"]
        pairs = {"distance": ("far", "far_spread"), "energy": ("high", "high_spread")}
        trust = {key: [constants[name].item() for name in names] for key, names in pairs.items()}
        trust["threshold"] = constants["threshold"].item()
    used = {name for layer in layers for name in layer["inputs"]} | {"whitener", "centres"}
    tensors, packed = pack({name: value for name, value in constants.items() if name in used})
    last_map = next(layer["inputs"][0] for layer in layers if layer["output"] == "features")
    told = {
        "layers": layers,
        "steps": list_steps(layers, last_map),
        "last_map": last_map,
        "tensors": tensors,
        "temperature": constants["temperature"].item(),
        "trust": trust,
    }
    return told, base64.b64encode(packed).decode()


def list_layers(graph: Any, constants: dict[str, NDArray[Any]]) -> list[dict[str, Any]]:
    """Return the layers from an ONNX graph's ``net_input`` to its ``logits`` and ``features``, as the engine has them.

    Constants that they take are added.
    Raises ConvlensError for a layer that the engine does not have.
    """
    from onnx import helper

    layers: list[dict[str, Any]] = []
    computed, other_names = {"net_input"}, dict[str, str]()
    for node in graph.node:
        if {"logits", "features"} <= computed:
            break  # what comes now makes the answer of them
        inputs = [other_names.get(name, name) for name in node.input]
        if not (set(inputs) & computed):
            continue  # it stands before the net, or computes with shapes, which are fixed here
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        layer: dict[str, Any] = {"op": node.op_type, "inputs": inputs, "output": node.output[0]}
        axes = set(constants[inputs[1]].tolist()) if node.op_type.startswith("Reduce") and len(inputs) > 1 else None
        match node.op_type:
            case "Shape":
                continue
            case "Identity" | "Dropout":
                other_names[node.output[0]] = inputs[0]
                continue
            case "Conv" if attributes.get("group", 1) == 1 and set(attributes.get("dilations", [1])) == {1}:
                layer |= {"pads": attributes.get("pads", [0] * 4), "strides": attributes.get("strides", [1, 1])}
            case "MaxPool" | "AveragePool" if (
                not attributes.get("ceil_mode")
                and set(attributes.get("dilations", [1])) == {1}
                and (node.op_type == "MaxPool" or not any(attributes.get("pads", [])))
            ):
                layer |= {"pads": attributes.get("pads", [0] * 4), "strides": attributes.get("strides", [1, 1])}
                layer["kernel"] = attributes["kernel_shape"]
            case "BatchNormalization":
                weight, bias, mean, variance = (constants[name].astype(np.float64) for name in inputs[1:5])
                factor = weight / np.sqrt(variance + attributes.get("epsilon", 1e-5))
                names = [f"{node.output[0]}.{part}" for part in ("factor", "offset")]
                constants |= dict(zip(names, (factor, bias - mean * factor), strict=True))
                layer |= {"op": "Affine", "inputs": [inputs[0], *names]}
            case "Relu" | "LogSoftmax":
                pass
            case "Add" if set(inputs) <= computed:  # of two maps: a shortcut
                pass
            case "Gelu" if attributes.get("approximate", b"none") == b"none":
                pass
            case "ReduceMax" | "ReduceMean" if axes in SPACE:
                layer["inputs"] = inputs[:1]
            case "GlobalMaxPool" | "GlobalAveragePool":
                layer["op"] = "ReduceMax" if node.op_type == "GlobalMaxPool" else "ReduceMean"
            case "Reshape" | "Flatten":
                layer |= {"op": "Reshape", "inputs": inputs[:1]}
            case "Gemm" if attributes.get("transB") == 1 and not attributes.get("transA"):
                pass
            case name:
                raise ConvlensError(f"the page cannot compute {name} as this net has it; ONNX can")
        computed.add(node.output[0])
        layers.append(layer)
    return layers


def list_steps(layers: list[dict[str, Any]], last_map: str) -> list[dict[str, Any]]:
    """Return what is shown of the net's inside: what each convolution finds, and what is left of it where it is pooled.

    What is found is shown behind the activation, unless that comes behind the pooling. A convolution of a shortcut is
    shown in the sum that it is a part of.
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
    """Return the tensors' descriptions, small ones with their values, and the others as 16-bit numbers in a row.

    A row (an output channel) is scaled so that its largest number is 32767: each is off by 1 / 65534 of that at most.
    """
    described, parts, at = {}, [], 0
    for name, value in constants.items():
        about: dict[str, Any] = {"shape": list(value.shape)}
        described[name] = about
        if value.size <= SMALL:
            about["values"] = [float(f"{number:.9g}") for number in value.ravel().tolist()]
            continue
        rows = value.reshape(len(value), -1).astype(np.float64)
        scales = np.maximum(np.abs(rows).max(axis=1), 1e-30) / 32767
        parts.append(np.round(rows / scales[:, None]).astype("<i2").tobytes())
        about |= {"at": at, "scales": [float(f"{scale:.9g}") for scale in scales.tolist()]}
        at += value.size
    return described, b"".join(parts)
