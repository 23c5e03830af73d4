"""Find model bundles: in run folders, in folders of their own, and in the package. Must not import torch."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

from convlens.errors import ConvlensError, UnfinishedRunError, UnknownNameError, UsageError
from convlens.run_dir import RunDir

# the files of a bundle
WEIGHTS, CONFIG, CARD, UNCERTAINTY = "model.safetensors", "config.json", "README.md", "uncertainty.safetensors"

GRAPH = "graph.onnx"  # optional: the ONNX graph without its weights


def bundled_models() -> dict[str, Path]:
    """Return the folders of the models that are part of the package, by name."""
    root = Path(str(resources.files("convlens") / "weights"))
    return {path.name: path for path in sorted(root.iterdir())} if root.is_dir() else {}


def read_verified(path: Path, sha256: str, remedy: str = "") -> bytes:
    """Read a file of a bundle and check its digest.

    Args:
        path: The file.
        sha256: The expected SHA-256 digest, in hexadecimal.
        remedy: Text to append to the error message.

    Raises:
        ConvlensError: If the digest differs.
        OSError: If the file cannot be read.
    """
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ConvlensError(f"{path} is damaged: its SHA-256 is not the one in {CONFIG}{remedy}")
    return content


def resolve_bundle(source: str | Path) -> Path:
    """Return the folder of a bundle.

    Args:
        source: A run folder, a bundle's folder, or the name of a bundled model. The name wins over a folder of the same
            name; write the folder as a path, such as ``./mnist``.

    Raises:
        UnknownNameError: If there is neither such a folder nor such a model.
        UsageError: If the run is not finished, or ``source`` is something else.
    """
    if str(source) in (bundled := bundled_models()):
        return bundled[str(source)]
    path = Path(source)
    if (path / WEIGHTS).is_file() and (path / CONFIG).is_file():
        return path
    run = RunDir(path)
    if (path / CARD).is_file() and run.config.is_file():
        return path  # a bundle without its weights: loading it reports them as missing
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
    raise UnknownNameError("run folder or model", str(source), bundled)
