"""A section of the benchmarks: how it is timed, tabled, run, and written into a page and a record."""

from __future__ import annotations

import convlens  # noqa: F401 - first: it says how OpenMP's threads wait, which PyTorch reads when it is loaded

# isort: split
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convlens.data.dataset import Dataset
from convlens.data.loading import load_dataset
from convlens.system.device import select_device, set_num_threads, system_info

RECORDS = Path(__file__).parent / "records"
VERSIONS = ("convlens", "numpy", "onnxruntime", "pillow", "scikit-learn")  # PyTorch's is the machine's
Record = dict[str, Any]
Section = Callable[[], tuple[list[Record], str]]  # gives its records, and their table


def timed(work: Callable[[], object]) -> float:
    """Return the wall seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float], digits: int = 2) -> list[str]:
    """Return two cells of a table: the median; the least and the most."""
    return [f"{statistics.median(values):.{digits}f}", f"{min(values):.{digits}f}, {max(values):.{digits}f}"]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def answer(module: str, *arguments: object) -> Any:
    """Run a benchmark's module in a process of its own; return the JSON that it prints last.

    How OpenMP's threads wait there is in the environment, since convlens was imported here.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_cost(seconds: float | None) -> None:
    """Print seconds, and this process's peak memory, for who asks by :func:`answer`."""
    print(json.dumps({"seconds": seconds, "mib": peak_mib()}))


def peak_mib() -> float:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def net_label(net: str, options: Mapping[str, Any]) -> str:
    """Return a net and its options as they are typed behind --model."""
    return " ".join([net, *(f"--{name} {value}" for name, value in options.items())])


def percent(share: float | None) -> str:
    """Return an accuracy as a cell of a table."""
    return "" if share is None else f"{share:.2%}"


def cifar_name() -> str:
    """Return what CIFAR-10 is called here: the JPEG copy in class folders where there is one, else the original."""
    return "cifar10-jpeg" if Path("cifar10-jpeg").is_dir() else "cifar10"


def load_named(name: str) -> Dataset:
    """Return the data set of this name; CIFAR-10 is what :func:`cifar_name` says."""
    return load_dataset(cifar_name() if name == "cifar10" else name)


def put(file: Path, mark: str, make: Callable[[str], str]) -> None:
    """Make what stands between the marks of that name in a file anew, from what stood there."""
    start, end = f"<!-- {mark} -->\n", f"\n<!-- end {mark} -->"
    before, rest = file.read_text(encoding="utf-8").split(start)
    old, after = rest.split(end, 1)
    file.write_text(before + start + make(old) + end + after, encoding="utf-8")


def shown(about: Record) -> str:
    """Return what a page has of a section's record: its table, and when it was measured."""
    return "\n".join([*about["table"], "", f"Measured on {about['date']}."])


def run_sections(sections: dict[str, Section], names: list[str], page: Path) -> None:
    """Run the sections of these names; keep their records, and put their tables on ``page``.

    Each has a process of its own, for what fit() asks of the memory would quicken the others' contenders too.
    """
    if len(names) > 1:
        failed = [name for name in names if subprocess.run([sys.executable, sys.argv[0], name]).returncode]
        if failed:
            sys.exit(f"these sections failed, and their tables are what they were: {', '.join(failed)}")
        return
    (name,) = names
    if name != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all else is of the processor
    set_num_threads()
    print(f"{name} ...", flush=True)
    try:
        records, rows = sections[name]()
    except subprocess.CalledProcessError as error:
        if error.stderr:  # what a command said that was not to be seen
            error.add_note(error.stderr if isinstance(error.stderr, str) else error.stderr.decode())
        raise
    about = {
        "machine": system_info(select_device()),
        "versions": {package: version(package) for package in VERSIONS},
        "date": time.strftime("%Y-%m-%d"),
        "records": records,
        "table": rows.splitlines(),
    }
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    put(page, name, lambda _: shown(about))
    print(rows, flush=True)
