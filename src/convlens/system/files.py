"""The layout of a run on disk: what each file is called, how it is written (atomically) and read."""

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


MAX_JSON_BYTES = 64 << 20  # bytes; a checkpoint of 10,000 epochs has 3 MB

ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}  # in lists of names


def write_name_list(path: Path, reasons: Mapping[str, str]) -> None:
    """Write a list of names, one a line, each with a reason after a tab if there is one."""
    lines = []
    for name, why in reasons.items():
        name, why = ("".join(ESCAPES.get(character, character) for character in text) for text in (name, why))
        lines.append(f"{name}\t{why}\n" if why else f"{name}\n")
    write_text(path, "".join(lines))


def read_name_list(path: str | Path) -> list[str]:
    """Return the names in a list that :func:`write_name_list` or a person wrote; ConvlensError if unreadable."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ConvlensError(f"cannot read {path}: {error.strerror}") from None
    meant = {escaped: character for character, escaped in ESCAPES.items()}
    names = (line.removesuffix("\r").split("\t", 1)[0] for line in text.split("\n"))
    return [re.sub(r"\\[\\tnr]", lambda match: meant[match[0]], name) for name in names if name]


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; when the block ends well it takes the place of ``path`` at once.

    The content is on disk (fsync of file and folder) before the name points to it, so a crash leaves the old
    file or the new one, never half of one. A full or read-only disk raises ConvlensError naming the file.
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
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner reads
        fsync(temporary)
        os.replace(temporary, path)
        outcome = "it is there, but may not outlast a power failure"
        fsync(path.parent)
    except OSError as error:
        raise ConvlensError(f"cannot write {path}: {error.strerror or error}; {outcome}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # on a disk that has become read-only it stays
                temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file or folder to disk; folders cannot be flushed on Windows, where renaming is enough."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes only what it may write
    try:
        if hasattr(fcntl, "F_FULLFSYNC"):  # on a Mac, fsync stops at the disk's own memory
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
    # a file's name that is no UTF-8 becomes an escape of JSON, and is the same name again when it is read
    write_text(path, text.encode("utf-8", errors="backslashreplace").decode("utf-8"))


def write_json_best_effort(path: Path, content: dict[str, Any]) -> None:
    """Write JSON whole or not at all, but without waiting for the disk, and without a word if it cannot be written."""
    with contextlib.suppress(OSError, ValueError):  # or holds what is no number: the training will say so
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
    """Read a JSON object; ConvlensError names the file if it is missing, too large or not one."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_JSON_BYTES:
            raise ValueError(f"it is no file of at most {MAX_JSON_BYTES >> 20} MiB")
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConvlensError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ConvlensError(f"cannot read {path}: {error}") from None
    return parse_json(content, str(path))


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    """Return the JSON object in the bytes of a file; ConvlensError that names it if they are none."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        parsed = json.loads(content.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ConvlensError(f"cannot read {name}: {error}") from None
    if not isinstance(parsed, dict):
        raise ConvlensError(f"cannot read {name}: it holds no JSON object")
    return parsed
