"""Find an interrupted run, and check that it can be resumed on this machine."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from convlens.data.dataset import Dataset
from convlens.distributed.process_group import launcher_start_time
from convlens.errors import ConvlensError, UsageError
from convlens.run_dir import RunDir
from convlens.runs.artifacts import current_command, current_version
from convlens.runs.config import RunConfig
from convlens.system.device import select_device, set_num_threads, system_info
from convlens.system.files import read_json
from convlens.system.hardware import available_cores


def find_interrupted_run(out: str | Path | None, launch_id: str | None) -> Path | None:
    """Return the run that an earlier attempt of this torchrun job started in ``out`` or in ``runs``, or None.

    An incomplete folder ``out`` is removed.
    """
    if out is not None and not (Path(out) / "config.json").exists():
        RunDir(out).remove_if_incomplete()
    for path in [Path(out) / "config.json"] if out is not None else Path("runs").glob("*/config.json"):
        with contextlib.suppress(ConvlensError, OSError):
            config = read_json(path)
            same = config.get("launch_id") == launch_id and config.get("command") == current_command()
            if same and path.stat().st_mtime >= launcher_start_time():
                return path.parent
    return None


def recorded_device(config: RunConfig) -> torch.device:
    """Return the device of a run, or the best one of this machine if it lacks that device."""
    try:
        return select_device(config.recipe.device)
    except UsageError:
        return select_device("auto")


def environment_diff(path: str | Path, config: RunConfig, *, accept: bool) -> list[str]:
    """Return what differs from the environment in which a run was started and could change its last digits.

    Sets the number of threads to that of the run, as far as this machine has the cores.

    Raises:
        UsageError: Something differs and ``accept`` is False. Another number of processes is always accepted.
    """
    names = {"device": "device", "device_name": "processor", "torch": "version of PyTorch"}
    was, now = config.machine, system_info(recorded_device(config))
    if was.get("processes", 1) == now["processes"]:
        names["threads"] = "number of threads"
        now["threads"] = set_num_threads(min(config.recipe.threads, available_cores()))
    else:
        set_num_threads()
    changes = [f"{name} ({was.get(key)}, now {now[key]})" for key, name in names.items() if was.get(key) != now[key]]
    if config.version != (own := current_version()):
        changes.append(f"version of convlens ({config.version}, now {own})")
    if changes and not accept:
        raise UsageError(
            f"{path} was started with another {', another '.join(changes)}: the result would differ from that of an "
            "uninterrupted training; resume it nevertheless with `accept_changes`"
        )
    if was.get("processes", 1) != now["processes"]:
        changes.append(f"number of processes ({was.get('processes', 1)}, now {now['processes']})")
    return changes


def require_data_on_disk(path: str | Path, source: Any, data: Any) -> Any:
    """Return ``data``, or where they are None the recorded ``source``; UsageError if neither is known."""
    if data is None and source is None:
        raise UsageError(f"the data of {path} were objects in memory; only data on disk can be resumed")
    return source if data is None else data


def require_same_data(path: str | Path, dataset: Dataset, fingerprint: str) -> None:
    """Raise UsageError if the data are not those with which the run or group ``path`` was started."""
    if dataset.fingerprint() != fingerprint:
        name = dataset.source or dataset.name
        raise UsageError(f"the data in {name} have changed since {path} was started; train anew")
