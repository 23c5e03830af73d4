"""Snapshots: the weights of a model at several steps of its training."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from convlens.errors import ConvlensError
from convlens.inference.bundle import write_tensors


def write_snapshot(folder: Path, step: int, model: nn.Module) -> None:
    """Write all weights and buffers of the model after ``step`` steps as a safetensors file."""
    write_tensors(folder / f"step-{step:08d}.safetensors", model.state_dict())


def list_snapshots(folder: Path) -> dict[int, Path]:
    """Return the snapshots in a folder: step -> file, in order of the steps."""
    found = {path: re.fullmatch(r"step-(\d{8})\.safetensors", path.name) for path in folder.glob("step-*")}
    return {int(match[1]): path for path, match in sorted(found.items()) if match}


def load_snapshot(path: Path, model: nn.Module) -> None:
    """Load a snapshot into a model; raise ConvlensError if it is unreadable or of another architecture."""
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConvlensError(f"{path} is not a snapshot of this model; delete it to skip it: {reason}") from None
