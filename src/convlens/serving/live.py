"""The live page: what runs have come to, finished or under way, beside each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convlens.errors import ConvlensError
from convlens.runfolder import RunFolder, read_json
from convlens.shipping.twin import read_part


def list_runs(paths: Sequence[str | Path]) -> list[RunFolder]:
    """Return the run folders that are named, those in a series one by one; UsageError for what is none."""
    folders = []
    for path in paths:
        if RunFolder.is_series(path):
            folders += [RunFolder(Path(path) / name) for name in read_json(Path(path) / "series.json")["runs"]]
        else:
            folders.append(RunFolder.open(path))
    return folders


def describe_run(folder: RunFolder) -> dict[str, Any]:
    """Return what the page shows of a run, whatever there is of it yet."""
    told: dict[str, Any] = {"name": folder.path.name, "metrics": []}
    try:
        config = folder.read_config()
        recipe, counts = config["recipe"], config["data"]["counts"]
        told |= {
            "data": config["data"]["name"],
            "recipe": recipe["name"],
            "seed": recipe["seed"],
            "net": config["model"]["name"],
            "epochs": recipe["epochs"],
            "images": counts["train"],
            "command": config["command"],
        }
        if folder.metrics.is_file():
            told["metrics"] = folder.read_metrics()
        if folder.progress.is_file():
            told["progress"] = read_json(folder.progress)
        if folder.mistakes.is_file():
            told["mistakes"] = folder.mistakes.stat().st_mtime_ns
        if folder.report.is_file():
            test = read_json(folder.test)
            told["test"] = {key: test[key] for key in ("accuracy", "accuracy_interval", "n")}
    except (ConvlensError, KeyError, OSError, ValueError):
        pass  # it is being written, or has gone: the next look will tell
    return told


def make_live_page() -> str:
    """Return the page as HTML; it asks for ``runs.json`` and ``N/mistakes.json`` beside it."""
    page = read_part("live.html")
    parts = {
        "STYLE": read_part("page.css") + read_part("live.css"),
        "SCRIPT": read_part("paint.js") + read_part("live.js"),
    }
    for name, content in parts.items():
        page = page.replace(f"[{name}]", content)
    return page


def to_json(runs: Sequence[RunFolder]) -> bytes:
    """Return what the page asks for: every run as :func:`describe_run` has it."""
    return json.dumps([describe_run(run) for run in runs], allow_nan=False).encode()
