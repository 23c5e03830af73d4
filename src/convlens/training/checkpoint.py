"""Checkpoints: the whole state of a training, written so that a crash at any moment leaves a whole one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from convlens.errors import ConvlensError
from convlens.inference.bundle import write_tensors
from convlens.system.files import read_json, write_json
from convlens.training.best_weights import BestWeights
from convlens.training.finite import check_finite, divergence_error
from convlens.training.metrics import RunningMetrics
from convlens.training.state import EpochRecord, TrainState

if TYPE_CHECKING:
    from convlens.training.build import TrainSetup

FORMAT = 2
KEEP_LAST = 2

logger = logging.getLogger("convlens")


class Checkpointer:
    """Saves and restores a training: state, weights, average, optimizer, best weights.

    All ranks restore; rank 0 saves.

    Args:
        store: Folder of checkpoints; without one the training is not saved.
        setup: The training.
        best: Its model selection.
    """

    def __init__(self, store: CheckpointStore | None, setup: TrainSetup, best: BestWeights):
        self._store, self._setup, self._best = store, setup, best
        self._saved_step = -1

    def restore(self) -> TrainState:
        """Return the state of the last checkpoint, after restoring its tensors; a new state if there is none."""
        world, recipe = self._setup.world, self._setup.recipe
        saved = self._store.load() if self._store is not None else None
        world.assert_same(saved[0].step if saved else 0, "the step of the last checkpoint")
        if saved is None or self._store is None:
            return TrainState(grad_accum_steps=recipe.grad_accum_steps)
        state, tensors = saved
        from_tensors(tensors, self._setup, self._best)
        self._saved_step = state.step
        if world.is_main:
            self._store.clear(state.step)  # a process killed right after a save has left old checkpoints
        return state

    def save(self, state: TrainState, metrics: RunningMetrics) -> None:
        """Write a checkpoint, unless the last one is of the same step.

        Raises:
            DivergenceError: If a weight or the loss is NaN or infinite; nothing is written.
        """
        if state.step == self._saved_step:
            return
        metrics.flush()
        weights = {k: v for k, v in self._setup.model.state_dict().items() if v.is_floating_point()}
        check_finite({f"the weight {name}": value for name, value in weights.items()}, state.step, self._setup.recipe)
        if not math.isfinite(state.loss_sum):
            raise divergence_error("the loss", state.step, self._setup.recipe)
        if self._store is not None and self._setup.world.is_main:
            self._store.save(state, to_tensors(self._setup, self._best))
        self._saved_step = state.step


class CheckpointStore:
    """A folder of checkpoints, of which the last two are kept.

    A checkpoint is a safetensors file named after its step, and a JSON manifest of the same name with the small state
    and the SHA-256 of both. The manifest is written last, and tensors without one are ignored, so a power failure at
    any moment leaves a whole checkpoint. A single flipped bit is detected.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._damaged: set[str] = set()

    def save(self, state: TrainState, tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint; on ConvlensError the older ones are unchanged."""
        path = self.folder / f"{name_of(state.step)}.safetensors"
        values, manifest = asdict(state), path.with_suffix(".json")
        try:
            sha256 = digest(write_tensors(path, tensors), values)
            write_json(manifest, {"format": FORMAT, "sha256": sha256, "state": values})
        except ConvlensError:
            if not manifest.exists():  # tensors without a manifest only fill the disk
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            raise
        self.clear(state.step)

    def clear(self, step: int) -> None:
        """Delete all but the checkpoint of ``step`` and the last whole one before it.

        Older ones go, damaged ones that :meth:`load` has found, and files that a crash left half-written.
        """
        whole = [step_of(path) for path in self._manifests() if path.stem not in self._damaged]
        kept = {name_of(step), *[name_of(older) for older in whole if older < step][: KEEP_LAST - 1]}
        with contextlib.suppress(OSError):  # files that cannot be deleted do no harm
            for file in sorted(self.folder.iterdir(), key=lambda file: file.suffix != ".json"):  # manifests first
                if re.match(r"\.?step-\d{8}\.", file.name) and file.stem not in kept:
                    file.unlink(missing_ok=True)

    def load(self) -> tuple[TrainState, dict[str, Tensor]] | None:
        """Return state and tensors of the newest whole checkpoint; None if there is no checkpoint.

        A warning names a damaged checkpoint and the step of the older one that replaces it.

        Raises:
            ConvlensError: If all checkpoints are damaged.
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
                logger.warning("%s; resuming from step %d instead of %d", why, found[0].step, step_of(path))
            return found
        if damage:
            raise ConvlensError(f"{damage[0][1]}; no whole checkpoint is left: train anew")
        return None

    def _manifests(self) -> list[Path]:
        """Return the JSON files of the checkpoints, newest first."""
        return sorted(self.folder.glob("step-????????.json"), reverse=True)


def digest(sha256: str, state: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a whole checkpoint, from the SHA-256 of its tensor file and its state."""
    return hashlib.sha256(f"{sha256} {json.dumps(state, sort_keys=True)}".encode()).hexdigest()


def name_of(step: int) -> str:
    """Return the name of the two files of the checkpoint of ``step``, without suffix."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's file."""
    return int(path.stem.removeprefix("step-"))


def read_checkpoint(manifest: Path) -> tuple[TrainState, dict[str, Tensor]]:
    """Return one checkpoint's state and tensors; ConvlensError names the file if it is damaged or missing."""
    path = manifest.with_suffix(".safetensors")
    values = read_json(manifest)
    try:
        if values["format"] != FORMAT:
            raise ConvlensError(f"{manifest} was written by another version of convlens: format {values['format']}")
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


def to_tensors(setup: TrainSetup, best: BestWeights) -> dict[str, Tensor]:
    """Return all tensors of a training under one flat set of names."""
    tensors = {f"net.{key}": value for key, value in setup.model.state_dict().items()}
    tensors |= {f"average.{key}": value for key, value in setup.ema.weights.items()}
    tensors |= {f"best.{key}": value for key, value in best.weights.items()}
    tensors |= {f"optimizer.{key}": value for key, value in setup.optimizer.tensors().items()}
    # cloned, because safetensors refuses tied weights: one storage under two names
    return {key: value.clone() for key, value in tensors.items()}


def from_tensors(tensors: Mapping[str, Tensor], setup: TrainSetup, best: BestWeights) -> None:
    """Restore the tensors of :func:`to_tensors`; ConvlensError if they are of another model or optimizer."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    try:
        setup.model.load_state_dict(part("net."))
        setup.optimizer.load_tensors(part("optimizer."))
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConvlensError(f"the checkpoint does not fit this version of convlens: {reason}; train anew") from None
    device = next(setup.model.parameters()).device
    setup.ema.weights = {key: value.to(device) for key, value in part("average.").items()}
    best.weights = {key: value.to(device) for key, value in part("best.").items()}
