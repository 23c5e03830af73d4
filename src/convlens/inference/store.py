"""Where bundles lie: in run folders, in folders of their own, in the package. Without PyTorch."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

from convlens.errors import ConvlensError, UnfinishedRunError, UnknownNameError, UsageError
from convlens.run_dir import RunDir

# the files of a bundle
WEIGHTS, CONFIG, CARD, UNCERTAINTY = "model.safetensors", "config.json", "README.md", "trust.safetensors"

GRAPH = "graph.onnx"  # its ONNX, without weights: not every bundle has one


def bundled_models() -> dict[str, Path]:
    """Return the bundles that come with convlens, by name."""
    root = Path(str(resources.files("convlens") / "weights"))
    return {path.name: path for path in sorted(root.iterdir())} if root.is_dir() else {}


def read_verified(path: Path, sha256: str, remedy: str = "") -> bytes:
    """Return the content of a bundle's file; ConvlensError, with a remedy, if it is not the one with this SHA-256."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ConvlensError(f"{path} is damaged: its SHA-256 is not the one in {CONFIG}{remedy}")
    return content


def resolve_bundle(source: str | Path) -> Path:
    """Return the bundle's folder for a run folder, a bundle's folder, or the name of a shipped model.

    A folder goes before a shipped model of the same name only if it is written as a path (``./mnist``).
    """
    if str(source) in (shipped := bundled_models()):
        return shipped[str(source)]
    path = Path(source)
    if (path / WEIGHTS).is_file() and (path / CONFIG).is_file():
        return path
    run = RunDir(path)
    if (path / CARD).is_file() and run.config.is_file():
        return path  # a bundle that has lost its weights: reading it says so
    if run.config.is_file():
        if not (run.model / CONFIG).is_file():
            raise UnfinishedRunError(path)
        return run.model
    if path.exists():
        RunDir.refuse_group(path)
        if path.suffix == ".onnx":
            raise UsageError(
                f"{path} is an ONNX file, for `predict`, `serve`, `verify` and `export --format html`; name the run"
            )
        raise UsageError(f"{path} is neither a run folder nor a model bundle")
    raise UnknownNameError("run folder or model", str(source), shipped)
