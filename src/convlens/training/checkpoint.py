"""Checkpoints: the whole state of a training, written so that a crash leaves an older whole one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from convlens.errors import ConvlensError
from convlens.runfolder import read_json, replacing, write_json
from convlens.training.optim import WeightAverage

KEPT = 2


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch came to: a row of ``metrics.csv``. ``seconds`` is training time so far, without evaluation."""

    epoch: int
    seconds: float
    lr: float
    train_loss: float
    train_acc: float
    val_loss: float | None = None
    val_acc: float | None = None
    test_loss: float | None = None
    test_acc: float | None = None


@dataclass
class TrainState:
    """Everything that a training has come to, besides tensors."""

    step: int = 0
    seconds: float = 0.0
    # of the epoch that is under way
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    records: list[EpochRecord] = field(default_factory=list)
    best_epoch: int = 0  # 0: none yet
    finished: bool = False


class CheckpointStore:
    """A folder of checkpoints, the last two of them kept.

    Each is one safetensors file, named after its step; ``latest.json`` holds the small state and names the file
    with its SHA-256, and is replaced last. Whatever moment the power fails at, it names a whole file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = folder / "latest.json"

    def save(self, state: TrainState, tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint; ConvlensError leaves the last one as it was."""
        content = dump_tensors({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
        path = self.folder / f"step-{state.step:08d}.safetensors"
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        values = {"format": 1, "file": path.name, "sha256": hashlib.sha256(content).hexdigest()}
        write_json(self.manifest, {**values, "state": asdict(state)})
        for old in sorted(self.folder.glob("step-*.safetensors"))[:-KEPT]:
            old.unlink(missing_ok=True)

    def load(self) -> tuple[TrainState, dict[str, Tensor]] | None:
        """Return the last checkpoint, None if there is none yet; ConvlensError if it is damaged."""
        if not self.manifest.exists():
            return None
        manifest = read_json(self.manifest)
        try:
            path = self.folder / Path(str(manifest["file"])).name
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
                raise ConvlensError(f"{path} is damaged: its SHA-256 is not the one that was written")
            values = dict(manifest["state"])
            values["records"] = [EpochRecord(**record) for record in values["records"]]
            return TrainState(**values), load_tensors(content)
        except OSError as error:
            raise ConvlensError(f"the checkpoint {path} cannot be read: {error.strerror}") from None
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ConvlensError(f"the checkpoint in {self.folder} is damaged: {error}") from None


def pack(
    net: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage, best: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return all tensors of a training under one flat set of names."""
    tensors = {f"net.{key}": value for key, value in net.state_dict().items()}
    tensors |= {f"average.{key}": value for key, value in average.weights.items()}
    tensors |= {f"best.{key}": value for key, value in best.items()}
    for number, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{slot}": v for slot, v in slots.items() if isinstance(v, Tensor)}
    # tied weights would be one storage under two names, which safetensors refuses
    return {key: value.clone() for key, value in tensors.items()}


def unpack(
    tensors: Mapping[str, Tensor], net: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage
) -> dict[str, Tensor]:
    """Put the tensors of :func:`pack` back where they came from; return the best weights."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    net.load_state_dict(part("net."))
    device = next(net.parameters()).device
    average.weights = {key: value.to(device) for key, value in part("average.").items()}
    slots: dict[int, dict[str, Any]] = {}
    for key, value in part("optimizer.").items():
        number, slot = key.split(".", 1)
        slots.setdefault(int(number), {})[slot] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return {key: value.to(device) for key, value in part("best.").items()}
