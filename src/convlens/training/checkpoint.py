"""Checkpoints: the whole state of a training, written so that a crash leaves an older whole one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from convlens.errors import ConvlensError
from convlens.inference.bundle import write_tensors
from convlens.system.files import read_json, write_json
from convlens.training.ema import EMA
from convlens.training.optimizers import Optimizer
from convlens.training.state import EpochRecord, TrainState

FORMAT = 2

KEEP_LAST = 2


class CheckpointStore:
    """A folder of checkpoints, the last two of them kept.

    Each is a safetensors file named after its step, and a JSON file of the same name with the small state and the
    SHA-256 of both, which is written last: without it the tensors do not count. Whatever moment the power fails
    at, a whole checkpoint is there; one bit that is not what was written, and it is known for damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._damaged: set[str] = set()

    def save(self, state: TrainState, tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint; ConvlensError leaves the older ones as they were."""
        path = self.folder / f"{name_of(state.step)}.safetensors"
        values, manifest = asdict(state), path.with_suffix(".json")
        try:
            sha256 = digest(write_tensors(path, tensors), values)
            write_json(manifest, {"format": FORMAT, "sha256": sha256, "state": values})
        except ConvlensError:
            if not manifest.exists():  # on a disk that is full, tensors that do not count are in the way
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            raise
        self.clear(state.step)

    def clear(self, step: int) -> None:
        """Delete what is neither the checkpoint after ``step`` nor the whole one before it.

        That is older ones, damaged ones that :meth:`load` has found, and what a crash left half-written.
        """
        whole = [step_of(path) for path in self._manifests() if path.stem not in self._damaged]
        kept = {name_of(step), *[name_of(older) for older in whole if older < step][: KEEP_LAST - 1]}
        with contextlib.suppress(OSError):  # what cannot be cleared away does no harm
            for file in sorted(self.folder.iterdir(), key=lambda file: file.suffix != ".json"):  # manifests first
                if re.match(r"\.?step-\d{8}\.", file.name) and file.stem not in kept:
                    file.unlink(missing_ok=True)

    def load(self) -> tuple[TrainState, dict[str, Tensor]] | None:
        """Return the newest whole checkpoint, None if there is none yet.

        One that is damaged is announced on standard error, with what it costs, and the one before it taken;
        ConvlensError if all are.
        """
        damage: list[tuple[Path, ConvlensError]] = []
        self._damaged.clear()
        for manifest in self._manifests():
            try:
                found = read_checkpoint(manifest)
            except ConvlensError as error:
                damage.append((manifest, error))
                self._damaged.add(manifest.stem)
                continue
            for path, why in damage:
                print(
                    f"convlens: {why}; going on from step {found[0].step} instead of {step_of(path)}", file=sys.stderr
                )
            return found
        if damage:
            raise ConvlensError(f"{damage[0][1]}; no whole checkpoint is left: train anew")
        return None

    def _manifests(self) -> list[Path]:
        """Return the JSON files of the checkpoints, newest first."""
        return sorted(self.folder.glob("step-????????.json"), reverse=True)


def digest(sha256: str, state: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a checkpoint as a whole, from that of its tensors' file and its state."""
    return hashlib.sha256(f"{sha256} {json.dumps(state, sort_keys=True)}".encode()).hexdigest()


def name_of(step: int) -> str:
    """Return the name of the two files of the checkpoint after ``step``, without their endings."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step that a checkpoint is named after."""
    return int(path.stem.removeprefix("step-"))


def read_checkpoint(manifest: Path) -> tuple[TrainState, dict[str, Tensor]]:
    """Return one checkpoint's state and tensors; ConvlensError names the file if it is damaged or missing."""
    path = manifest.with_suffix(".safetensors")
    values = read_json(manifest)
    try:
        if values["format"] != FORMAT:
            raise ConvlensError(f"{manifest} is of another version of convlens: format {values['format']}")
        content = path.read_bytes()
        state = dict(values["state"])
        if digest(hashlib.sha256(content).hexdigest(), state) != values["sha256"]:
            raise ConvlensError(f"the checkpoint {path} is damaged: its SHA-256 is not the one that was written")
        state["records"] = [EpochRecord(**record) for record in state["records"]]
        return TrainState(**state), load_tensors(content)
    except OSError as error:
        raise ConvlensError(f"the checkpoint {path} cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ConvlensError(f"the checkpoint {manifest} is damaged: {error}") from None


def to_tensors(net: nn.Module, optimizer: Optimizer, average: EMA, best: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all tensors of a training under one flat set of names."""
    tensors = {f"net.{key}": value for key, value in net.state_dict().items()}
    tensors |= {f"average.{key}": value for key, value in average.weights.items()}
    tensors |= {f"best.{key}": value for key, value in best.items()}
    tensors |= {f"optimizer.{key}": value for key, value in optimizer.tensors().items()}
    # tied weights would be one storage under two names, which safetensors refuses
    return {key: value.clone() for key, value in tensors.items()}


def from_tensors(
    tensors: Mapping[str, Tensor], net: nn.Module, optimizer: Optimizer, average: EMA
) -> dict[str, Tensor]:
    """Put the tensors of :func:`pack` back where they came from; return the best weights."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    try:
        net.load_state_dict(part("net."))
        optimizer.load_tensors(part("optimizer."))
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConvlensError(f"the checkpoint does not fit this version of convlens: {reason}; train anew") from None
    device = next(net.parameters()).device
    average.weights = {key: value.to(device) for key, value in part("average.").items()}
    return {key: value.to(device) for key, value in part("best.").items()}
