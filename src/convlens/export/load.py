"""Load a model for ONNX Runtime, exporting its graph first where it has none."""

from __future__ import annotations

from pathlib import Path

from convlens.inference.onnx_runtime import OnnxPredictor, embed_digest, find_onnx
from convlens.inference.store import resolve_bundle


def load_onnx(source: str | Path) -> OnnxPredictor:
    """Load what :func:`find_onnx` finds, or else make it in memory, as ``convlens export`` does.

    Raises UsageError where the packages that this takes are not installed, ConvlensError for what cannot be exported.
    """
    found = find_onnx(source)
    if found is not None:
        return found
    from convlens.export.onnx import build_onnx

    return OnnxPredictor(embed_digest(build_onnx(resolve_bundle(source)).SerializeToString()), str(source))
