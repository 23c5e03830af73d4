"""Inference with ONNX Runtime, which starts without PyTorch. Must not import torch."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from convlens.data.images import Pixels
from convlens.data.preprocess import Preprocess
from convlens.errors import ConvlensError, UsageError
from convlens.evaluation.conformal import COVERAGE_LEVELS
from convlens.inference.metadata import BundleMetadata
from convlens.inference.predictor import Predictor
from convlens.inference.store import GRAPH, UNCERTAINTY, WEIGHTS, read_verified, resolve_bundle
from convlens.system.extras import missing_extra
from convlens.system.hardware import available_cores

# a program that imported ONNX Runtime before convlens has telemetry on: at least do not report our models
onnxruntime.disable_telemetry_events()

METADATA_KEY = "convlens"  # our entry in the metadata of the ONNX file

FORMAT = 3

OUTDATED_MESSAGE = "an older convlens: export it again"

MAX_FILE_BYTES = 1 << 30

MAX_PROBABILITY_ERROR = 1e-4  # largest accepted deviation from the probabilities of PyTorch

BATCH_SIZE = 500

MAX_DISTANCES = 1 << 18  # images x classes in a batch; with 512 features they take 512 MiB

DIGEST_KEY = b'"digest":"'

DIGEST_PLACEHOLDER = b"0" * 64


class OnnxPredictor(Predictor):
    """A model in an ONNX file that convlens wrote.

    Attributes:
        metadata: What the file stores about the model.
        name: What error messages call the model.
        is_quantized: Whether the convolutions compute in int8.
    """

    def __init__(self, content: bytes, name: str, tensors: Mapping[str, NDArray[np.float32]] | None = None):
        """Load a serialized model.

        Args:
            content: The ONNX file.
            name: What error messages call the model.
            tensors: Weights that are not part of ``content``.

        Raises:
            ConvlensError: If convlens did not write the model, if it was changed, or if it refers to other files.
        """
        verify_digest(content, name)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = available_cores()
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # security: weights come from the bundle's own files, never from a path in the model
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/nonexistent")
        try:
            if tensors:
                values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in tensors.values()]
                options.add_external_initializers(list(tensors), values)
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            metadata = self.metadata = json.loads(self._session.get_modelmeta().custom_metadata_map[METADATA_KEY])
            if metadata["format"] != FORMAT:
                newer = "a newer convlens; pip install --upgrade convlens"
                raise ConvlensError(f"{name} was made by {newer if metadata['format'] > FORMAT else OUTDATED_MESSAGE}")
            self.classes = tuple(map(str, metadata["classes"]))
            self.preprocess = Preprocess.from_json(metadata["preprocess"])
            thresholds = metadata["conformal_thresholds"]
            self.conformal_thresholds = thresholds and tuple(math.inf if t is None else float(t) for t in thresholds)
            num_outputs = self._session.get_outputs()[0].shape[1]
            if num_outputs != len(self.classes) or (thresholds and len(thresholds) != len(COVERAGE_LEVELS)):
                raise ValueError("its metadata do not fit its graph")
        except ConvlensError:
            raise
        except Exception as error:  # the exceptions of ONNX Runtime have no common base class
            raise ConvlensError(f"{name} cannot be loaded: {str(error).splitlines()[0][:300]}") from None
        self.is_quantized = metadata["training"].get("bits") == 8
        self.name, self._content, self._tensors = name, content, tensors or {}

    @classmethod
    def load(cls, path: Path) -> OnnxPredictor:
        """Load an ONNX file that ``convlens export`` wrote.

        Raises:
            UsageError: If there is no such file, or it cannot be read.
            ConvlensError: If convlens did not write the file, or it was changed.
        """
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ConvlensError(f"{path} has over {MAX_FILE_BYTES:,} bytes")
            return cls(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise UsageError(f"there is no file {path}") from None
        except OSError as error:
            raise UsageError(
                f"cannot read {path}: {error.strerror}; pass the .onnx file that `convlens export` wrote"
            ) from None

    @classmethod
    def from_bundle(cls, folder: Path) -> OnnxPredictor:
        """Load the ONNX graph of a bundle, with the weights from its safetensors files.

        Raises:
            ConvlensError: If a file is missing or does not match its digest in ``config.json``.
        """
        metadata = BundleMetadata.read(folder)
        if metadata.onnx is None:
            raise ConvlensError(f"{folder} has no ONNX graph; `convlens export` adds one")
        try:
            content = read_verified(folder / GRAPH, metadata.onnx.sha256, "; `convlens export` makes it again")
            tensors = load(read_verified(folder / WEIGHTS, metadata.sha256))
            if metadata.uncertainty is not None:
                tensors |= load(read_verified(folder / UNCERTAINTY, metadata.uncertainty["sha256"]))
            names = metadata.onnx.external_initializers
            return cls(content, str(folder), {name: tensors[key] for name, key in names.items()})
        except OSError as error:
            raise ConvlensError(f"cannot read {error.filename}: {error.strerror}") from None
        except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
            raise ConvlensError(f"{folder} is not a bundle that can be read: {error!r}") from None

    def run(self, pixels: Pixels) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """Return probabilities (N, K) and whether images are in-distribution (N,); see :meth:`Predictor.run`."""
        names = [output.name for output in self._session.get_outputs() if output.name != "label"]
        images = pixels.transpose(0, 2, 3, 1)
        # the graph computes the distances to all class means: images x classes x features values
        batch_size = max(min(BATCH_SIZE, MAX_DISTANCES // len(self.classes)), 1)
        batches = [
            self._session.run(names, {"images": np.ascontiguousarray(images[start : start + batch_size])})
            for start in range(0, len(images), batch_size)
        ]
        probabilities, *rest = (np.concatenate(values) for values in zip(*batches, strict=True))
        return probabilities, rest[0] if rest else None

    def to_onnx(self) -> Any:
        """Return the ONNX model, a protobuf, including its weights.

        Raises:
            UsageError: If the package onnx is not installed.
        """
        try:
            import onnx
        except ImportError:
            raise missing_extra("ONNX export needs the extra `export`", "export") from None
        model = onnx.load_from_string(self._content)
        for tensor in model.graph.initializer:
            if tensor.name in self._tensors:
                tensor.CopyFrom(onnx.numpy_helper.from_array(self._tensors[tensor.name], tensor.name))
        return model

    def write(self, path: Path) -> None:
        """Write the model, including its weights, as one file."""
        path.write_bytes(embed_digest(self.to_onnx().SerializeToString()) if self._tensors else self._content)

    def verify(self) -> float:
        """Compare the outputs for the reference images in the file with the stored ones.

        The stored outputs are those of PyTorch; for an int8 file, those of the file itself when it was written.

        Returns:
            The largest absolute error of a probability.

        Raises:
            ConvlensError: If the error exceeds 1e-4, or an out-of-distribution decision differs.
        """
        reference = self.metadata["reference"]
        images = np.frombuffer(base64.b64decode(reference["images"]), np.uint8).reshape(reference["shape"])
        probabilities, in_distribution = self.run(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        error = float(np.abs(probabilities - np.array(reference["probabilities"])).max())
        if not error <= MAX_PROBABILITY_ERROR:
            raise ConvlensError(
                f"{self.name} gives other outputs than when it was made: a probability differs by {error:.2g}"
            )
        if in_distribution is not None and in_distribution.tolist() != reference["in_distribution"]:
            raise ConvlensError(f"{self.name} reports other images as unknown than when it was made")
        return error


def embed_digest(content: bytes) -> bytes:
    """Return a serialized model with its SHA-256 digest in its metadata; ValueError if it has no place for one."""
    start = content.index(DIGEST_KEY) + len(DIGEST_KEY)
    end = start + len(DIGEST_PLACEHOLDER)
    blank = content[:start] + DIGEST_PLACEHOLDER + content[end:]
    return content[:start] + hashlib.sha256(blank).hexdigest().encode() + content[end:]


def verify_digest(content: bytes, name: str) -> None:
    """Raise ConvlensError unless a serialized model matches the digest that :func:`embed_digest` wrote."""
    try:
        intact = embed_digest(content) == content
    except ValueError:
        raise ConvlensError(
            f"{name} is not a complete ONNX file written by convlens: make it with `convlens export`"
        ) from None
    if not intact:
        raise ConvlensError(f"{name} was damaged or changed since convlens wrote it: make it with `convlens export`")


def find_onnx(source: str | Path) -> OnnxPredictor | None:
    """Load an ONNX file, or the ONNX graph of a run or bundle; return None if the bundle has no graph.

    Raises:
        UsageError: If there is no such file, run or bundle.
        ConvlensError: If it cannot be read.
    """
    path = Path(source)
    if path.suffix == ".onnx":
        return OnnxPredictor.load(path)
    folder = resolve_bundle(source)
    return OnnxPredictor.from_bundle(folder) if (folder / GRAPH).is_file() else None


def load_predictor(source: str | Path) -> Predictor:
    """Load a model for prediction: with ONNX Runtime if it has a graph, because that starts faster, else with PyTorch.

    Raises:
        UsageError: If there is no such file, run or bundle.
        ConvlensError: If it cannot be read.
    """
    found = find_onnx(source)
    if found is not None:
        return found
    from convlens.inference.classifier import Classifier
    from convlens.system.device import set_num_threads

    set_num_threads()
    return Classifier.load(source)
