"""The weights of a net along its training, kept to look back at it."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from convlens.errors import ConvlensError
from convlens.inference.bundle import write_tensors


def write_snapshot(folder: Path, step: int, net: nn.Module) -> None:
    """Keep all weights and buffers of the net after ``step`` steps, as safetensors."""
    write_tensors(folder / f"step-{step:08d}.safetensors", net.state_dict())


def list_snapshots(folder: Path) -> dict[int, Path]:
    """Return the snapshots in a folder by their step, the first first."""
    found = {path: re.fullmatch(r"step-(\d{8})\.safetensors", path.name) for path in folder.glob("step-*")}
    return {int(match[1]): path for path, match in sorted(found.items()) if match}


def load_snapshot(path: Path, net: nn.Module) -> None:
    """Give the net the weights of a snapshot; ConvlensError if they cannot be read or are those of another net."""
    try:
        net.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConvlensError(f"{path} is no snapshot of this net; delete it to go without: {reason}") from None
