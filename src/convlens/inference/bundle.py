"""The model bundle: a folder with everything that is needed to use a trained model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from convlens.data.preprocess import Preprocess
from convlens.errors import ConvlensError, UnknownNameError, UsageError
from convlens.evaluation.uncertainty import UncertaintyModel
from convlens.inference.metadata import Architecture, BundleMetadata, unreadable_bundle
from convlens.inference.model_card import make_model_card
from convlens.inference.store import CARD, UNCERTAINTY, WEIGHTS, read_verified
from convlens.models import create_model
from convlens.system.files import atomic_write, write_text


@dataclass(frozen=True, eq=False)
class Bundle:
    """A trained model with its architecture, classes and preprocessing.

    Attributes:
        model: The trained module.
        architecture: The name and the constructor arguments that rebuild the module.
        classes: The K class names.
        preprocess: Turns an image into the model's input pixels.
        training: What the model card reports: data, recipe, machine, test metrics.
        uncertainty: None if the model was trained without validation images.
    """

    model: nn.Module
    architecture: Architecture
    classes: tuple[str, ...]
    preprocess: Preprocess
    training: Mapping[str, Any]
    uncertainty: UncertaintyModel | None = None

    def save(self, folder: Path) -> None:
        """Write the tensors (safetensors), the model card and, last, ``config.json``."""
        sha256 = write_tensors(folder / WEIGHTS, self.model.state_dict())
        write_text(folder / CARD, self.card())
        uncertainty = None
        if self.uncertainty is not None:
            digest = write_tensors(folder / UNCERTAINTY, self.uncertainty.tensors())
            uncertainty = {**self.uncertainty.to_json(), "sha256": digest}
        BundleMetadata(
            architecture=self.architecture,
            classes=self.classes,
            preprocess=self.preprocess,
            training=dict(self.training),
            sha256=sha256,
            uncertainty=uncertainty,
        ).write(folder)

    def card(self) -> str:
        """Return the model card as Markdown."""
        uncertainty = self.uncertainty
        fitted = (uncertainty.temperature, uncertainty.num_images) if uncertainty else None
        return make_model_card(self.architecture.name, self.classes, self.preprocess, self.training, fitted)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors atomically as a safetensors file; return the SHA-256 digest of the file."""
    content = dump_tensors({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read a safetensors file; raise ConvlensError if its SHA-256 digest differs."""
    return load_tensors(read_verified(path, sha256))


def check_shapes(tensors: Mapping[str, Tensor], architecture: Architecture) -> None:
    """Raise ValueError unless the shapes of the weights are those of the architecture.

    The model is created on the meta device, so that absurd arguments in a damaged file cannot exhaust the memory. A
    model whose constructor reads tensor values cannot be created there and is not checked.
    """
    try:
        with torch.device("meta"):
            model = create_model(architecture.name, **architecture.arguments)
        shapes = {key: value.shape for key, value in model.state_dict().items()}
    except RuntimeError as error:
        if "meta tensor" not in str(error):
            raise
    else:
        if {key: value.shape for key, value in tensors.items()} != shapes:
            raise ValueError(f"its weights are not those of {architecture.name} with {architecture.arguments}")


def load_bundle(folder: Path) -> Bundle:
    """Load a bundle.

    Args:
        folder: The bundle's folder; see :func:`convlens.inference.store.resolve_bundle`.

    Returns:
        The bundle, with its model in evaluation mode.

    Raises:
        ConvlensError: If a file is missing or damaged, or was written by a newer convlens.
    """
    metadata = BundleMetadata.read(folder)
    try:
        architecture = metadata.architecture
        tensors = read_tensors(folder / WEIGHTS, metadata.sha256)
        check_shapes(tensors, architecture)
        model = create_model(architecture.name, **architecture.arguments)
        model.load_state_dict(tensors)
        uncertainty = None
        if (values := metadata.uncertainty) is not None:
            uncertainty = UncertaintyModel.from_json(values, read_tensors(folder / UNCERTAINTY, values["sha256"]))
    except FileNotFoundError as error:
        raise ConvlensError(f"{error.filename} is missing") from None
    except UnknownNameError as error:
        raise ConvlensError(f"{folder}: {error}; import the module that registers it first") from None
    except (
        OSError, KeyError, TypeError, ValueError, OverflowError, RuntimeError, SafetensorError, UsageError
    ) as error:  # fmt: skip
        raise unreadable_bundle(folder, error) from None
    return Bundle(model.eval(), architecture, metadata.classes, metadata.preprocess, metadata.training, uncertainty)
