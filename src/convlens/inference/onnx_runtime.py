"""Predicting with ONNX Runtime: a cold start without PyTorch."""

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
from convlens.inference.predictor import Predictor
from convlens.inference.store import CONFIG, GRAPH, UNCERTAINTY, WEIGHTS, read_verified, resolve_bundle
from convlens.system.files import read_json
from convlens.system.hardware import available_cores

# whoever imported ONNX Runtime before convlens has its telemetry on: at least our models are not reported
onnxruntime.disable_telemetry_events()

METADATA = "convlens"  # the entry of the file's metadata that says what the net is

FORMAT = 2

OUTDATED_MESSAGE = "an older convlens: export it again"

MAX_FILE_BYTES = 1 << 30  # bytes of a file

MAX_PROBABILITY_ERROR = 1e-4  # the most that a probability may be off from what PyTorch gave

BATCH = 500

MAX_DISTANCES = 1 << 18  # images x classes of a batch: of 512 features 512 MiB

DIGEST_PLACEHOLDER = b"0" * 64


class OnnxPredictor(Predictor):
    """A net in an ONNX file that convlens wrote, ready to use."""

    def __init__(self, content: bytes, name: str, tensors: Mapping[str, NDArray[np.float32]] | None = None):
        """Load a serialised model, called ``name`` in messages; ``tensors`` are weights that it leaves outside.

        Raises ConvlensError for what convlens did not write, or what was changed since, and for a model that names
        other files.
        """
        verify_digest(content, name)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = available_cores()
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # weights come from the bundle's own files, never from a path that a model names
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/nonexistent")
        try:
            if tensors:
                values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in tensors.values()]
                options.add_external_initializers(list(tensors), values)
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            about = self.about = json.loads(self._session.get_modelmeta().custom_metadata_map[METADATA])
            if about["format"] != FORMAT:
                told = "a newer convlens; pip install --upgrade convlens"
                raise ConvlensError(f"{name} was made by {told if about['format'] > FORMAT else OUTDATED_MESSAGE}")
            self.classes = tuple(map(str, about["classes"]))
            self.preprocess = Preprocess.from_json(about["preprocess"])
            bounds = about["bounds"]
            self.bounds = bounds and tuple(math.inf if bound is None else float(bound) for bound in bounds)
            answers = self._session.get_outputs()[0].shape[1]
            if answers != len(self.classes) or (self.bounds and len(self.bounds) != len(COVERAGE_LEVELS)):
                raise ValueError("what it says of itself does not fit its net")
        except ConvlensError:
            raise
        except Exception as error:  # ONNX Runtime's own kinds have no common one
            raise ConvlensError(f"{name} cannot be loaded: {str(error).splitlines()[0][:300]}") from None
        self.in_8_bits = about["trained"].get("bits") == 8
        self.name, self._content, self._tensors = name, content, tensors or {}

    @classmethod
    def load(cls, path: Path) -> OnnxPredictor:
        """Load an ONNX file that ``convlens export`` wrote."""
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ConvlensError(f"{path} has over {MAX_FILE_BYTES:,} bytes")
            return cls(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise UsageError(f"there is no file {path}") from None
        except OSError as error:
            told = f"cannot read {path}: {error.strerror}; it takes the .onnx file that `convlens export` wrote"
            raise UsageError(told) from None

    @classmethod
    def of_bundle(cls, folder: Path) -> OnnxPredictor:
        """Load the graph that lies in a bundle's folder, with the weights of its safetensors files.

        Raises ConvlensError if a file is missing or is not the one that ``config.json`` names.
        """
        config = read_json(folder / CONFIG)
        try:
            graph = config["onnx"]
            content = read_verified(folder / GRAPH, graph["sha256"], "; `convlens export` makes it anew")
            tensors = load(read_verified(folder / WEIGHTS, config["sha256"]))
            if "trust" in config:
                tensors |= load(read_verified(folder / UNCERTAINTY, config["trust"]["sha256"]))
            return cls(content, str(folder), {name: tensors[key] for name, key in graph["outside"].items()})
        except OSError as error:
            raise ConvlensError(f"cannot read {error.filename}: {error.strerror}") from None
        except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
            raise ConvlensError(f"{folder} is not a bundle that can be read: {error!r}") from None

    def run(self, pixels: Pixels) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """Return probabilities (N, K) and which images are known (N,); see :meth:`Predictor.run`."""
        names = [output.name for output in self._session.get_outputs() if output.name != "label"]
        images = pixels.transpose(0, 2, 3, 1)
        # the distances to all classes take images x classes x features numbers
        batch = max(min(BATCH, MAX_DISTANCES // len(self.classes)), 1)
        parts = [
            self._session.run(names, {"images": np.ascontiguousarray(images[start : start + batch])})
            for start in range(0, len(images), batch)
        ]
        probabilities, *known = (np.concatenate(values) for values in zip(*parts, strict=True))
        return probabilities, known[0] if known else None

    def model(self) -> Any:
        """Return the ONNX model, a protobuf, with all its weights inside; UsageError where onnx is not installed."""
        try:
            import onnx
        except ImportError:
            raise UsageError("this needs a package more: pip install 'convlens[export]'") from None
        model = onnx.load_from_string(self._content)
        for tensor in model.graph.initializer:
            if tensor.name in self._tensors:
                tensor.CopyFrom(onnx.numpy_helper.from_array(self._tensors[tensor.name], tensor.name))
        return model

    def write(self, path: Path) -> None:
        """Write the model as one file, with all its weights inside."""
        path.write_bytes(embed_digest(self.model().SerializeToString()) if self._tensors else self._content)

    def verify(self) -> float:
        """Return by how much a probability is off, at most, from what PyTorch said of the made-up images in the file.

        In a file of 8 bits stands what it said itself when it was made. Raises ConvlensError if that is over 1e-4, or
        an image is not known that was, or the other way round.
        """
        golden = self.about["golden"]
        images = np.frombuffer(base64.b64decode(golden["images"]), np.uint8).reshape(golden["shape"])
        probabilities, known = self.run(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        drift = float(np.abs(probabilities - np.array(golden["probabilities"])).max())
        if not drift <= MAX_PROBABILITY_ERROR:
            raise ConvlensError(
                f"{self.name} answers otherwise than when it was made: a probability is off by {drift:.2g}"
            )
        if known is not None and known.tolist() != golden["known"]:
            raise ConvlensError(f"{self.name} knows other images than when it was made")
        return drift


def embed_digest(content: bytes) -> bytes:
    """Return a serialised model with the SHA-256 of all of it in its metadata; ValueError if there is no place."""
    start = content.index(b'"seal":"') + 8
    blank = content[:start] + DIGEST_PLACEHOLDER + content[start + 64 :]
    return content[:start] + hashlib.sha256(blank).hexdigest().encode() + content[start + 64 :]


def verify_digest(content: bytes, name: str) -> None:
    """Raise ConvlensError unless a serialised model is what :func:`seal` returned, to the last bit."""
    try:
        whole = embed_digest(content) == content
    except ValueError:
        raise ConvlensError(
            f"{name} is no ONNX file that convlens wrote, or not the whole of it: make it with `convlens export`"
        ) from None
    if not whole:
        raise ConvlensError(f"{name} was damaged or changed since convlens wrote it: make it with `convlens export`")


def find_onnx(source: str | Path) -> OnnxPredictor | None:
    """Load an ONNX file, or the ONNX graph of a run or model; None if it has none yet.

    Raises UsageError if there is no such thing and ConvlensError if it cannot be read.
    """
    path = Path(source)
    if path.suffix == ".onnx":
        return OnnxPredictor.load(path)
    folder = resolve_bundle(source)
    return OnnxPredictor.of_bundle(folder) if (folder / GRAPH).is_file() else None


def load_predictor(source: str | Path) -> Predictor:
    """Load what predicts soonest: see :func:`find_onnx`, or else the net in PyTorch; it raises what that does."""
    found = find_onnx(source)
    if found is not None:
        return found
    from convlens.inference.classifier import Classifier
    from convlens.system.device import set_num_threads

    set_num_threads()
    return Classifier.load(source)
