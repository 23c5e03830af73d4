"""The layout of a run on disk: the names of its files, its creation, its lock."""

from __future__ import annotations

import contextlib
import csv
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convlens.errors import ConvlensError, UsageError
from convlens.system.files import read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

GROUP = "group.json"  # makes a folder a group of runs


class RunDir:
    """The folder of one run, such as ``runs/mnist-1``, and the paths of its files."""

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
        """Create a new folder: ``out``, or the next free ``runs/<data>-<n>``.

        Raises:
            UsageError: ``out`` exists.
            ConvlensError: The folder cannot be created.
        """
        if out is not None:
            require_new_path(out)
            try:
                Path(out).mkdir(parents=True)
            except OSError as error:
                raise ConvlensError(f"cannot create the run folder {out}: {error.strerror}") from None
            return cls(out)
        for number in itertools.count(1):
            path = Path(parent) / f"{data_name}-{number}"
            try:
                path.mkdir(parents=True)  # exclusive: of two runs started at once, only one gets this number
                return cls(path)
            except FileExistsError:
                if os.path.lexists(path):
                    continue
                reason = f"{parent} is not a directory"  # but a broken link
            except OSError as error:
                reason = str(error.strerror)
            raise ConvlensError(f"cannot create the run folder {path}: {reason}; choose a writable place with `out`")
        raise AssertionError("unreachable")

    def remove_if_incomplete(self) -> None:
        """Remove the folder if it holds only files that are written before ``config.json``."""
        known = {self.split.name, self.excluded.name}
        with contextlib.suppress(OSError):
            if all(path.name in known or path.name.startswith(".") for path in self.path.iterdir()):
                shutil.rmtree(self.path)

    @staticmethod
    def is_group(path: str | Path) -> bool:
        """Return True if ``path`` is the folder of a group of runs."""
        return (Path(path) / GROUP).is_file()

    @staticmethod
    def refuse_group(path: str | Path) -> None:
        """Raise UsageError if ``path`` is a group of runs where one run is needed."""
        if RunDir.is_group(path):
            raise UsageError(f"{path} is a group of runs: name one of the run folders in it")

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Open an existing run; UsageError if ``path`` is not one."""
        run = cls(path)
        if not run.path.is_dir():
            raise UsageError(f"there is no run folder {path}; `convlens train` creates one")
        cls.refuse_group(path)
        if not run.config.is_file():
            raise UsageError(f"{path} is not a run folder: it has no config.json")
        return run

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for training inside the block; UsageError if another process holds the lock.

        The operating system releases the lock when a process dies. Windows and some network file systems have no such
        locks; there nothing is checked.
        """
        if fcntl is None:
            yield
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another process is training in {self.path}; wait for it or stop it") from None
            except OSError:  # a file system without locks
                pass
            yield
        finally:
            os.close(descriptor)

    def read_config(self) -> dict[str, Any]:
        """Return the content of the run's ``config.json``."""
        return read_json(self.config)

    def read_metrics(self) -> list[dict[str, float | None]]:
        """Return ``metrics.csv``, one dict per epoch; an empty cell is None."""
        with open(self.metrics, newline="", encoding="utf-8") as file:
            return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]


def require_new_path(path: str | Path, field: str = "out") -> None:
    """Raise UsageError if ``path``, the value of the parameter ``field``, exists."""
    if os.path.lexists(path):
        is_run = (Path(path) / "config.json").is_file() or RunDir.is_group(path)
        resume = ", or continue that run with `resume`" if is_run else ""
        raise UsageError(f"{path} exists already; choose another `{field}`{resume}", field=field)


def next_free_path(path: Path, *, numbered: bool = False) -> Path:
    """Return the first path that does not exist of ``path``, ``path-2``, ``path-3``, ...

    A file keeps its suffix. With ``numbered``, for folders, the first one is ``path-1``.
    """
    stem, suffix = (path.name, "") if numbered else (path.stem, path.suffix)
    candidates = (path.with_name(f"{stem}-{n}{suffix}") for n in itertools.count(1 if numbered else 2))
    return next(p for p in itertools.chain([] if numbered else [path], candidates) if not os.path.lexists(p))


@contextlib.contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``folder`` when the block succeeds; otherwise nothing remains."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        room = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-")
    except OSError as error:
        raise ConvlensError(f"cannot create the folder {folder}: {error.strerror}") from None
    with room as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        yield new
        try:
            new.rename(folder)
        except OSError as error:
            raise ConvlensError(f"cannot create the folder {folder}: {error.strerror}") from None
