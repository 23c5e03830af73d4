"""The ``config.json`` of a bundle. Must not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convlens.data.preprocess import Preprocess
from convlens.errors import ConvlensError
from convlens.inference.store import CONFIG
from convlens.system.files import read_json, write_json

FORMAT = 2


@dataclass(frozen=True)
class Architecture:
    """The name of a model and the arguments of its constructor."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class OnnxGraphInfo:
    """The ONNX graph in a bundle."""

    sha256: str
    external_initializers: dict[str, str]  # name in the graph -> name in the bundle's safetensors files


@dataclass(frozen=True, kw_only=True)
class BundleMetadata:
    """Everything that a bundle stores besides its tensors."""

    architecture: Architecture
    classes: tuple[str, ...]
    preprocess: Preprocess
    training: dict[str, Any]  # what the model card reports: data, recipe, machine, test metrics
    sha256: str  # digest of the weights
    uncertainty: dict[str, Any] | None = None  # values of UncertaintyModel.to_json, and the digest of its tensors
    onnx: OnnxGraphInfo | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``config.json``."""
        values = {
            "format": FORMAT,
            "model": asdict(self.architecture),
            "classes": list(self.classes),
            "preprocess": self.preprocess.to_json(),
            "training": self.training,
            "sha256": self.sha256,
            "uncertainty": self.uncertainty,
            "onnx": self.onnx and asdict(self.onnx),
        }
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BundleMetadata:
        """Rebuild the metadata from the values of :meth:`to_json`.

        Raises:
            KeyError: If a value is missing.
            TypeError: If a value has the wrong type.
            ValueError: If values do not fit together.
        """
        metadata = cls(
            architecture=Architecture(**values["model"]),
            classes=tuple(str(name) for name in values["classes"]),
            preprocess=Preprocess.from_json(values["preprocess"]),
            training=values["training"],
            sha256=values["sha256"],
            uncertainty=values.get("uncertainty"),
            onnx=OnnxGraphInfo(**values["onnx"]) if "onnx" in values else None,
        )
        arguments, shape = metadata.architecture.arguments, metadata.preprocess
        if len(metadata.classes) != arguments["classes"]:
            raise ValueError(f"{len(metadata.classes)} class names for {arguments['classes']} outputs")
        input_shape = tuple(arguments[name] for name in ("channels", "image_height", "image_width"))
        if (shape.channels, shape.height, shape.width) != input_shape:
            raise ValueError("the input size of the model differs from that of the preprocessing")
        return metadata

    @classmethod
    def read(cls, folder: Path) -> BundleMetadata:
        """Read the metadata of the bundle in a folder.

        Raises:
            ConvlensError: If ``config.json`` is missing, damaged, or of a newer format.
        """
        values = read_json(folder / CONFIG)
        version = values.get("format")
        if isinstance(version, int) and version > FORMAT:
            raise ConvlensError(
                f"{folder} was made by a newer convlens (bundle format {version}, this one reads {FORMAT}); "
                "upgrade with: pip install --upgrade convlens"
            )
        try:
            return cls.from_json(values)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise unreadable_bundle(folder, error) from None

    def write(self, folder: Path) -> None:
        """Write ``config.json``."""
        write_json(folder / CONFIG, self.to_json())


def unreadable_bundle(folder: Path, error: Exception) -> ConvlensError:
    """Return the error for a bundle that cannot be read, with the cause in one line."""
    reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    return ConvlensError(f"{folder} is not a bundle that can be read: {reason}")
