"""Measure speed, one section after another, and write JSON records and the tables of docs/benchmarks.md.

    python benchmarks/bench.py                    # all sections but gpu
    python benchmarks/bench.py commands overhead  # some

Nothing else should run meanwhile. What is compared runs in turn within one section, so that a slow minute of the
machine slows both; figures are medians with the fastest and the slowest, or ratios of pairs. CONVLENS_DATA names
real data.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from sections import Section, run_sections  # before PyTorch is loaded

# isort: split
import commands
import decoding
import pace
import predicting
import races
import scale
import serving

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"

SECTIONS: dict[str, Section] = {
    **{f"race-{name}": partial(races.race, name) for name in races.RACES},
    "speedrun": races.speedrun,
    "commands": commands.commands,
    "budget": commands.budget,
    "stages": commands.stages,
    "arithmetic": pace.arithmetic,
    "overhead": pace.overhead,
    "predict": predicting.predict,
    "int8": predicting.int8,
    "twin": predicting.twin,
    "serve": serving.serve,
    "see": predicting.see,
    "live": pace.live,
    "growth": pace.growth,
    "folders": decoding.folders,
    "many": decoding.many,
    "processes": scale.processes,
    "shards": scale.shards,
    "streams": scale.streams,
    "sweep": scale.sweep,
    "gpu": races.gpu,
}

if __name__ == "__main__":
    run_sections(SECTIONS, sys.argv[1:] or [name for name in SECTIONS if name != "gpu"], PAGE)
