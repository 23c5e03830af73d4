"""Read and write files: atomically, as JSON, CSV or lists of names."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from convlens.errors import ConvlensError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def cache_dir() -> Path:
    """Return the folder for downloads and decoded folders: ``CONVLENS_CACHE``, or the user's cache."""
    if chosen := os.environ.get("CONVLENS_CACHE"):
        return Path(chosen)
    from platformdirs import user_cache_path

    return user_cache_path("convlens")


MAX_JSON_BYTES = 64 << 20  # a checkpoint of 10,000 epochs has 3 MB

ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}  # in lists of names


def write_name_list(path: Path, reasons: Mapping[str, str]) -> None:
    """Write a list of names, one per line, each followed by a tab and its reason if that is not empty."""
    lines = []
    for name, why in reasons.items():
        name, why = ("".join(ESCAPES.get(character, character) for character in text) for text in (name, why))
        lines.append(f"{name}\t{why}\n" if why else f"{name}\n")
    write_text(path, "".join(lines))


def read_name_list(path: str | Path) -> list[str]:
    """Read a list written by :func:`write_name_list` or by hand; ConvlensError if it cannot be read."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ConvlensError(f"cannot read {path}: {error.strerror}") from None
    meant = {escaped: character for character, escaped in ESCAPES.items()}
    names = (line.removesuffix("\r").split("\t", 1)[0] for line in text.split("\n"))
    return [re.sub(r"\\[\\tnr]", lambda match: meant[match[0]], name) for name in names if name]


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that atomically replaces ``path`` when the block succeeds.

    The content is flushed to disk (fsync of file and folder) before it replaces the old file, so a crash leaves either
    the old file or the new one.

    Raises:
        ConvlensError: The file cannot be written, as on a full or read-only disk.
    """
    temporary, outcome = None, "nothing was changed"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp creates files that only their owner can read
        fsync(temporary)
        os.replace(temporary, path)
        outcome = "it was written, but may not survive a power failure"
        fsync(path.parent)
    except OSError as error:
        raise ConvlensError(f"cannot write {path}: {error.strerror or error}; {outcome}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # impossible if the disk has become read-only
                temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file or folder to disk; on Windows folders cannot be flushed, and renaming is enough."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes only writable files
    try:
        if hasattr(fcntl, "F_FULLFSYNC"):  # on a Mac, fsync does not flush the disk's own cache
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as readable JSON, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # bytes of file names that are not UTF-8 become JSON escapes, which decode to the same name
    write_text(path, text.encode("utf-8", errors="backslashreplace").decode("utf-8"))


def write_json_best_effort(path: Path, content: dict[str, Any]) -> None:
    """Write JSON atomically but without fsync; errors are ignored."""
    with contextlib.suppress(OSError, ValueError):  # NaN raises ValueError; the training reports it
        path.parent.mkdir(exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
        os.replace(new, path)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a header and rows as CSV, atomically; None becomes an empty cell."""
    with (
        atomic_write(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ConvlensError if the file is missing, too large or not a JSON object."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_JSON_BYTES:
            raise ValueError(f"it is not a file of at most {MAX_JSON_BYTES >> 20} MiB")
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConvlensError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ConvlensError(f"cannot read {path}: {error}") from None
    return parse_json(content, str(path))


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    """Parse the content of the file ``name`` as a JSON object; ConvlensError if it is not one."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not valid JSON")

    try:
        parsed = json.loads(content.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ConvlensError(f"cannot read {name}: {error}") from None
    if not isinstance(parsed, dict):
        raise ConvlensError(f"cannot read {name}: it is not a JSON object")
    return parsed
