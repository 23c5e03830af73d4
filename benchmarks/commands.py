"""Time whole commands, from shell to prompt: ``python benchmarks/commands.py`` prints the table of docs/benchmarks.md.

Each command runs once to warm the disk cache, then RUNS times; median, minimum and maximum of wall seconds.
Run it with nothing else running, the environment's ``convlens`` on the path.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw

RUNS = 5
COMMANDS = [
    "convlens --help",
    "convlens train digits --epochs 1",
    "convlens train digits",
    "convlens predict mnist scan.png",
]


def main() -> None:
    """Time every command in an empty folder and print a Markdown table."""
    print("| command | median | fastest, slowest |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        page = Image.new("L", (300, 400), 255)
        ImageDraw.Draw(page).line([(150, 80), (150, 320)], fill=0, width=30)
        page.save(Path(folder) / "scan.png")
        for command in COMMANDS:
            seconds = []
            for _ in range(RUNS + 1):
                start = time.perf_counter()
                subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
                seconds.append(time.perf_counter() - start)
            counted = seconds[1:]
            median = statistics.median(counted)
            print(f"| `{command}` | {median:.2f} s | {min(counted):.2f}, {max(counted):.2f} |", flush=True)


if __name__ == "__main__":
    main()
