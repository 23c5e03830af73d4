"""Runs that were begun: which one a job of torchrun goes on with, what was planned, and what has changed since."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from convlens.data.preprocess import Preprocess
from convlens.distributed.process_group import launcher_start_time
from convlens.errors import ConvlensError, UsageError
from convlens.run_dir import RunDir
from convlens.runs.artifacts import current_command
from convlens.system.device import select_device, set_num_threads, system_info
from convlens.system.files import read_json
from convlens.system.hardware import available_cores
from convlens.training.recipe import Recipe


def find_interrupted_run(out: str | Path | None, training: str | None) -> Path | None:
    """Return the run that this job of torchrun, started again, has begun, in ``out`` or in ``runs``.

    A folder ``out`` that it had only begun to fill is cleared away.
    """
    if out is not None and not (Path(out) / "config.json").exists():
        RunDir(out).clear_begun()
    for path in [Path(out) / "config.json"] if out is not None else Path("runs").glob("*/config.json"):
        with contextlib.suppress(ConvlensError, OSError):
            config = read_json(path)
            same = config.get("job") == training and config.get("command") == current_command()
            if same and path.stat().st_mtime >= launcher_start_time():
                return path.parent
    return None


def read_config(folder: RunDir, config: Mapping[str, Any]) -> tuple[Recipe, Preprocess]:
    """Return the recipe and the preprocessing of a run's config.json; ConvlensError if it is damaged."""
    try:
        config["data"]["source"], config["model"]["name"]
        return Recipe.from_json(config["recipe"]), Preprocess.from_json(config["preprocess"])
    except UsageError as error:  # such as a field that another version of convlens has
        raise ConvlensError(f"{folder.config} is of another version of convlens, or damaged: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ConvlensError(f"{folder.config} is damaged: {error!r}") from None


def recorded_device(config: Mapping[str, Any]) -> torch.device:
    """Return the device of the run of ``config``, or the best one here where this machine does not have it."""
    try:
        return select_device(config["recipe"]["device"])
    except UsageError:
        return select_device("auto")


def environment_diff(path: str | Path, config: Mapping[str, Any], *, accept: bool) -> list[str]:
    """Return what is not as it was when the run of ``config`` was started, of what decides the last digits.

    It computes with that run's threads from here on, if there are as many. Raises UsageError that names the changes
    unless they are accepted; another number of processes, which sum up in another order, is no hindrance.
    """
    names = {"device": "device", "device_name": "processor", "torch": "version of PyTorch"}
    was, now = config.get("machine", {}), system_info(recorded_device(config))
    if was.get("processes", 1) == now["processes"]:
        names["threads"] = "number of threads"
        now["threads"] = set_num_threads(min(config["recipe"]["threads"], available_cores()))
    else:
        set_num_threads()
    changes = [f"{name} ({was.get(key)}, now {now[key]})" for key, name in names.items() if was.get(key) != now[key]]
    if config.get("convlens") != (own := version("convlens")):
        changes.append(f"version of convlens ({config.get('convlens')}, now {own})")
    if changes and not accept:
        raise UsageError(
            f"{path} was started with another {', another '.join(changes)}: what comes of it would not be what "
            "one uninterrupted training gives; go on all the same with --accept-changes"
        )
    if was.get("processes", 1) != now["processes"]:
        changes.append(f"number of processes ({was.get('processes', 1)}, now {now['processes']})")
    return changes
