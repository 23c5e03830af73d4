"""Measure speed, one section after another, and write JSON records and the tables of docs/results/benchmarks.md.

    python -m benchmarks.run                    # all sections but gpu
    python -m benchmarks.run commands overhead  # some

Nothing else should run meanwhile. What is compared runs in turn within one section, so that a slow minute of the
machine slows both; figures are medians with the fastest and the slowest, or ratios of pairs. CONVLENS_DATA names
real data.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from benchmarks.harness import Section, run_sections  # before PyTorch is loaded

# isort: split
from benchmarks import cli_latency, distributed, image_decoding, inference, serving, throughput, time_to_accuracy

PAGE = Path(__file__).parent.parent / "docs" / "results" / "benchmarks.md"

SECTIONS: dict[str, Section] = {
    **{f"race-{name}": partial(time_to_accuracy.race, name) for name in time_to_accuracy.RACES},
    "speedrun": time_to_accuracy.speedrun,
    "commands": cli_latency.commands,
    "budget": cli_latency.budget,
    "stages": cli_latency.stages,
    "arithmetic": throughput.arithmetic,
    "overhead": throughput.overhead,
    "predict": inference.predict,
    "int8": inference.int8,
    "twin": inference.twin,
    "serve": serving.serve,
    "see": inference.see,
    "live": throughput.live,
    "growth": throughput.growth,
    "folders": image_decoding.folders,
    "many": image_decoding.many,
    "processes": distributed.processes,
    "shards": distributed.shards,
    "streams": distributed.streams,
    "sweep": distributed.sweep,
    "gpu": time_to_accuracy.gpu,
}

if __name__ == "__main__":
    run_sections(SECTIONS, sys.argv[1:] or [name for name in SECTIONS if name != "gpu"], PAGE)
