"""The live page: what runs have come to, finished or under way, beside each other."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convlens.errors import ConvlensError
from convlens.run_dir import SERIES, RunFolder
from convlens.system.files import read_json
from convlens.web.render import fill_page, read_part


def list_runs(paths: Sequence[str | Path]) -> list[RunFolder]:
    """Return the run folders that are named, those in a series or a folder one by one; UsageError for what is none."""
    folders = []
    for path in paths:
        if RunFolder.is_series(path):
            folders += [RunFolder(Path(path) / name) for name in read_json(Path(path) / SERIES)["runs"]]
        elif not RunFolder(path).config.exists() and (inside := find_runs(Path(path))):
            folders += list_runs(inside)
        else:
            folders.append(RunFolder.open(path))
    return folders


def find_runs(folder: Path) -> list[Path]:
    """Return the runs and series in a folder, the oldest first."""
    begun = [*folder.glob("*/config.json"), *folder.glob(f"*/{SERIES}")]
    return [file.parent for file in sorted(begun, key=lambda file: file.stat().st_mtime)]


def describe_run(folder: RunFolder) -> dict[str, Any]:
    """Return what the page shows of a run, whatever there is of it yet."""
    told: dict[str, Any] = {"name": folder.path.resolve().name, "metrics": []}
    try:
        config = folder.read_config()
        recipe = config["recipe"]
        told |= {
            "data": config["data"]["name"],
            "recipe": recipe["name"],
            "seed": recipe["seed"],
            "net": config["model"]["name"],
        }
        if folder.metrics.is_file():
            told["metrics"] = folder.read_metrics()
        if folder.mistakes.is_file():
            told["mistakes"] = folder.mistakes.stat().st_mtime_ns
        if folder.report.is_file():
            test = read_json(folder.test)
            told["test"] = {key: test[key] for key in ("accuracy", "accuracy_interval", "n")}
        elif folder.progress.is_file():
            # seconds since it was last heard of: in a long time it may have been stopped
            heard = max(file.stat().st_mtime for file in (folder.progress, folder.metrics) if file.is_file())
            told["progress"] = {**read_json(folder.progress), "silent": max(round(time.time() - heard), 0)}
        json.dumps(told, allow_nan=False)
    except (ConvlensError, AttributeError, KeyError, OSError, TypeError, ValueError):
        return {"name": told["name"], "metrics": []}  # it is being written, or has gone: the next look will tell
    return told


def make_live_page() -> str:
    """Return the page as HTML; it asks for ``runs.json`` and ``N/mistakes.json`` beside it."""
    style, script = read_part("page.css") + read_part("live.css"), read_part("paint.js") + read_part("live.js")
    return fill_page("live.html", {"STYLE": style, "SCRIPT": script})
