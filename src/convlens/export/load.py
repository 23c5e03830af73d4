"""Load a model for ONNX Runtime, exporting its graph first if necessary."""

from __future__ import annotations

from pathlib import Path

from convlens.inference.onnx_runtime import OnnxPredictor, embed_digest, find_onnx
from convlens.inference.store import resolve_bundle


def load_onnx(source: str | Path) -> OnnxPredictor:
    """Load an ONNX file, or the ONNX graph of a run or bundle; export the graph in memory if there is none.

    Raises:
        UsageError: If there is no such model, or the packages of the extra `export` are not installed.
        ConvlensError: If the model cannot be read or exported.
    """
    found = find_onnx(source)
    if found is not None:
        return found
    from convlens.export.onnx import build_onnx

    return OnnxPredictor(embed_digest(build_onnx(resolve_bundle(source)).SerializeToString()), str(source))
