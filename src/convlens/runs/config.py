"""The record of a run: ``config.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convlens.data.preprocess import Preprocess
from convlens.errors import ConvlensError, UsageError
from convlens.system.files import read_json, write_json
from convlens.training.recipe import Recipe


@dataclass(frozen=True)
class InitFrom:
    """Origin of the initial weights: a path or name, and how many tensors were used, such as "12 of 14"."""

    source: str
    num_tensors: str


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that is needed to repeat or resume a run."""

    version: str  # of convlens
    command: str
    recipe: Recipe  # resolved: with the device, threads and precision that were used
    model: dict[str, Any]  # "name", "arguments" of its constructor, "parameters" (their number)
    data: dict[str, Any]  # see artifacts.describe_data
    preprocess: Preprocess
    machine: dict[str, Any]  # see system.device.system_info
    launch_id: str | None = None  # of a job of torchrun
    init_from: InitFrom | None = None
    environment_changes: tuple[str, ...] = ()  # since the start, in the order of the resumptions

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``config.json``; fields that do not apply are left out."""
        values = {
            **vars(self),
            "recipe": dataclasses.asdict(self.recipe),
            "preprocess": self.preprocess.to_json(),
            "init_from": dataclasses.asdict(self.init_from) if self.init_from else None,
            "environment_changes": list(self.environment_changes) or None,
        }
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunConfig:
        """Rebuild a config; KeyError, TypeError, ValueError or UsageError if a value is missing or wrong."""
        for key, names in (("data", ("source", "fingerprint", "unreadable")), ("model", ("name", "arguments"))):
            for name in names:
                values[key][name]
        return cls(
            **{
                **values,
                "recipe": Recipe.from_json(values["recipe"]),
                "preprocess": Preprocess.from_json(values["preprocess"]),
                "init_from": InitFrom(**values["init_from"]) if values.get("init_from") else None,
                "environment_changes": tuple(values.get("environment_changes", ())),
            }
        )

    def write(self, path: Path) -> None:
        """Write ``config.json`` atomically."""
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> RunConfig:
        """Read ``config.json``; ConvlensError if it is missing, damaged or of another version of convlens."""
        values = read_json(path)
        try:
            return cls.from_json(values)
        except UsageError as error:  # such as a recipe field of another version
            raise ConvlensError(f"{path} is of another version of convlens, or damaged: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise ConvlensError(f"{path} is damaged: {error!r}") from None
