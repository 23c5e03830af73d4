"""Whole commands, from shell to prompt: with a budget, cold, and where the seconds of one go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw

from benchmarks.harness import Record, cifar_name, spread, table, timed
from convlens.runs.run import Run
from convlens.training.time_budget import parse_budget

BUDGETS = [
    "digits --budget 10s",
    "mnist --budget 20s",
    "fashion-mnist --budget 60s",
    "{cifar} --recipe cifar10-90 --budget 2m",
]


def budget() -> tuple[list[Record], str]:
    """Whole commands with a budget: the seconds asked and taken, the recipe picked, and the test accuracy."""
    records, rows = [], []
    for arguments in (text.format(cifar=cifar_name()) for text in BUDGETS):
        asked = parse_budget(arguments.split()[-1])
        with tempfile.TemporaryDirectory() as folder:
            command = ["convlens", "train", *arguments.split(), "--out", f"{folder}/run"]
            taken = timed(partial(subprocess.run, command, check=True, capture_output=True))
            run = Run(f"{folder}/run")
            recipe, accuracy = run.config["recipe"]["name"], run.accuracy
        told = {"arguments": arguments, "asked": asked, "taken": taken, "recipe": recipe, "accuracy": accuracy}
        records.append(told)
        rows.append([f"`train {arguments}`", f"`{recipe}`", f"{taken:.1f}", f"{taken / asked:.2f}", f"{accuracy:.2%}"])
    return records, table(["command", "recipe", "seconds", "fraction of the budget", "test accuracy"], rows)


COMMANDS = [
    "convlens --help",
    "convlens predict mnist scan.png",
    "convlens train digits --epochs 1",
    "convlens train digits",
    "convlens train mnist --recipe mnist-99",
]


def commands() -> tuple[list[Record], str]:
    """Whole commands from shell to prompt, in an empty folder, after one that warms the disk's cache."""
    records, rows = [], []
    # as a user's shell has it: Python keeps its compiled files
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:
        page = Image.new("L", (300, 400), 255)
        ImageDraw.Draw(page).line([(150, 80), (150, 320)], fill=0, width=30)
        page.save(Path(folder) / "scan.png")
        for command in COMMANDS:

            def run(command: str = command) -> None:
                subprocess.run(command.split(), cwd=folder, check=True, capture_output=True, env=environment)

            run()
            seconds = [timed(run) for _ in range(5)]
            records.append({"command": command, "seconds": seconds})
            rows.append([f"`{command}`", *spread(seconds)])
    return records, table(["command", "median, s", "fastest, slowest"], rows)


STAGES = """
import time
start = time.perf_counter()
marks = []
def mark(name):
    global start
    now = time.perf_counter()
    marks.append((name, now - start))
    start = now
from convlens.cli.startup import gc_paused
with gc_paused():
    import convlens.runs.experiment, convlens.runs.group
mark("import PyTorch, NumPy, matplotlib and convlens")
from convlens.runs.experiment import Experiment
experiment = Experiment.create("mnist", "mnist-99", out="run")
mark("find, check and read MNIST; build the model; look up the speed of bf16")
for record in experiment.epochs(): pass
mark(f"train, with checkpoints")
marks[-1] = (f"train", record.seconds), ("checkpoints and the rest of the loop", marks[-1][1] - record.seconds)
marks[-1:] = marks[-1]
experiment.finish()
mark("test 10,000 images in fp32; plots; report")
import json, os
print(json.dumps(marks), flush=True)
os._exit(0)  # as the command does
"""


def stages() -> tuple[list[Record], str]:
    """Where the seconds of one cold command go."""
    records = []
    for _ in range(5):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", STAGES], cwd=folder, capture_output=True, text=True, check=True
            )
            whole = time.perf_counter() - start
            marks: dict[str, float] = dict(json.loads(done.stdout.splitlines()[-1]))
            records.append({**marks, "start Python, and leave it": whole - sum(marks.values()), "all of it": whole})
    rows = [[name, *spread([record[name] for record in records])] for name in records[0]]
    return records, table(["stage", "median, s", "fastest, slowest"], rows)
