"""The layout of a run on disk: the names of its files, its creation, its lock."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convlens.errors import ConvlensError, UsageError
from convlens.system.files import read_json
from convlens.system.text import quoted

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class RunDir:
    """One run's folder: ``runs/mnist-1`` and the names of what lies in it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.csv"
        self.checkpoint = self.path / "checkpoint"
        self.snapshots = self.path / "snapshots"
        self.tensorboard = self.path / "tensorboard"
        self.model = self.path / "model"
        self.progress = self.path / "live" / "progress.json"
        self.mistakes = self.path / "live" / "mistakes.json"
        self.test = self.path / "test.json"
        self.confusion = self.path / "confusion_matrix.csv"
        self.predictions = self.path / "predictions.csv"
        self.split = self.path / "split.csv"
        self.excluded = self.path / "excluded.txt"
        self.plots = self.path / "plots"
        self.report = self.path / "report.html"

    @classmethod
    def create(cls, out: str | Path | None, data_name: str, parent: str | Path = "runs") -> RunDir:
        """Make a new folder: ``out``, or the next free ``runs/<data>-<n>``; an existing one is never reused."""
        if out is not None:
            cls.refuse_existing(out)
            try:
                Path(out).mkdir(parents=True)
            except OSError as error:
                raise ConvlensError(f"cannot make the run folder {out}: {error.strerror}") from None
            return cls(out)
        number = 1
        while True:
            path = Path(parent) / f"{data_name}-{number}"
            try:
                path.mkdir(parents=True)  # exclusive: of two runs started at once, only one gets this number
                return cls(path)
            except FileExistsError:
                if not os.path.lexists(path):  # not the name is taken: the parent is a link to nowhere
                    raise ConvlensError(
                        f"cannot make the run folder {path}: {parent} is no folder; choose a writable place with --out"
                    ) from None
                number += 1
            except OSError as error:
                raise ConvlensError(
                    f"cannot make the run folder {path}: {error.strerror}; choose a writable place with --out"
                ) from None

    def clear_begun(self) -> None:
        """Remove the folder if it holds nothing but what is written before ``config.json`` makes it a run."""
        known = {self.split.name, self.excluded.name}
        with contextlib.suppress(OSError):
            if all(path.name in known or path.name.startswith(".") for path in self.path.iterdir()):
                shutil.rmtree(self.path)

    @staticmethod
    def refuse_existing(out: str | Path) -> None:
        """Raise UsageError if there is something called ``out`` already."""
        if os.path.lexists(out):
            is_run = (Path(out) / "config.json").is_file() or RunDir.is_series(out)
            more = f", or continue it with --resume {quoted(out)}" if is_run else ""
            raise UsageError(f"{out} exists already; choose another --out{more}")

    @staticmethod
    def is_series(path: str | Path) -> bool:
        """Say whether ``path`` is the folder of a series of runs."""
        return (Path(path) / SERIES).is_file()

    @staticmethod
    def refuse_series(path: str | Path) -> None:
        """Raise UsageError if ``path`` is a series of runs, where one run is asked for."""
        if RunDir.is_series(path):
            raise UsageError(f"{path} is a series of runs: name one of them, a folder in it")

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Open an existing run; UsageError if ``path`` is not one."""
        run = cls(path)
        if not run.path.is_dir():
            raise UsageError(f"there is no run folder {path}; `convlens train` makes one")
        cls.refuse_series(path)
        if not run.config.is_file():
            raise UsageError(f"{path} is not a run folder: it has no config.json")
        return run

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from training in this folder inside the block; UsageError if one does already.

        The system itself gives the folder free when a process dies, however it dies. Windows and some network folders
        have no such claim.
        """
        if fcntl is None:
            yield
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another process is training in {self.path}; wait for it, or stop it") from None
            except OSError:  # a file system that knows no claims
                pass
            yield
        finally:
            os.close(descriptor)

    def read_config(self) -> dict[str, Any]:
        """Return the run's ``config.json``."""
        return read_json(self.config)

    def read_metrics(self) -> list[dict[str, float | None]]:
        """Return ``metrics.csv``, one dict an epoch; an empty cell is None."""
        with open(self.metrics, newline="", encoding="utf-8") as file:
            return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]


@contextlib.contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """Give a folder to fill, which becomes ``folder`` when the block ends well: it appears whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        room = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-")
    except OSError as error:
        raise ConvlensError(f"cannot make the folder {folder}: {error.strerror}") from None
    with room as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        yield new
        try:
            new.rename(folder)
        except OSError as error:
            raise ConvlensError(f"cannot make the folder {folder}: {error.strerror}") from None


SERIES = "series.json"  # makes a folder a series of runs
