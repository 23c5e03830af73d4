"""Finding the published files on this machine, or downloading them, and proving that they are the published ones."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

from convlens.errors import ConvlensError
from convlens.system.files import atomic_write, cache_dir
from convlens.system.progress import ProgressBar

_OFFLINE = ContextVar("from_here", default=False)

MAX_DOWNLOAD_BYTES = 200_000_000  # bytes; of what is published, CIFAR-10's archive unpacks to the most, 184 million


def search_path() -> list[Path]:
    """Return the folders in which data sets are looked for, in order."""
    chosen = [Path(p) for p in os.environ.get("CONVLENS_DATA", "").split(os.pathsep) if p]
    return [*chosen, Path("data"), cache_dir(), Path("/usr/share/datasets")]


def find_file(name: str, folders: Sequence[str]) -> Path | None:
    """Return ``name`` or ``name.gz`` from the first place of the search path that has it in one of ``folders``."""
    for root in search_path():
        for folder in folders:
            for path in (root / folder / name, root / folder / f"{name}.gz"):
                if path.is_file():
                    return path
    return None


def read_verified(path: Path, sha256: str) -> bytes:
    """Return the content of a plain or gzipped file; ConvlensError unless its SHA-256 (uncompressed) is right."""
    try:
        content = read_unpacked(path)
    except (OSError, EOFError, zlib.error) as error:
        raise ConvlensError(f"{path} cannot be read: {error}; delete it, and it is downloaded again") from None
    check_sha256(str(path), content, sha256)
    return content


def read_unpacked(path: Path) -> bytes:
    """Return the content of a plain or gzipped file; OSError if that is more than any published file has."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else open(path, "rb") as file:
        content = file.read(MAX_DOWNLOAD_BYTES + 1)
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise OSError(f"it has over {MAX_DOWNLOAD_BYTES:,} bytes")
    return content


def check_sha256(name: str, content: bytes, sha256: str) -> None:
    """Raise ConvlensError unless ``content`` (of the file ``name``) has the given SHA-256."""
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ConvlensError(
            f"{name} is not the published file ({len(content):,} bytes, SHA-256 {found[:12]}..., expected "
            f"{sha256[:12]}...); delete or replace it"
        )


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Download nothing inside the block: what is not on this machine is missing."""
    token = _OFFLINE.set(True)
    try:
        yield
    finally:
        _OFFLINE.reset(token)


def find_or_download(name: str, sha256: str, folders: Sequence[str], mirrors: Sequence[str]) -> bytes:
    """Return the verified content of ``name``: found on the search path, else from the first mirror that has it.

    ``mirrors`` are addresses of folders that hold ``name.gz``. A download lies in the user's cache only once it
    is complete and verified.
    """
    if found := find_file(name, folders):
        return read_verified(found, sha256)
    if _OFFLINE.get():
        raise ConvlensError(f"{name} is not on this machine")
    target = cache_dir() / folders[0] / f"{name}.gz"
    failures = []
    for mirror in mirrors:
        try:
            with atomic_write(target) as temporary:
                download(f"{mirror}{name}.gz", temporary)
                return read_verified(temporary, sha256)
        except ConvlensError as error:
            failures.append(f"{mirror}: {error}")
    raise ConvlensError(missing(name, folders[0], failures))


def missing(name: str, folder: str, failures: Sequence[str]) -> str:
    """Say that a file was neither found nor downloaded, and what to do."""
    tried = "; ".join(failures)
    return (
        f"{name} is not on this machine and could not be downloaded ({tried}); put it into data/{folder}/, "
        "or point CONVLENS_DATA at the folder that holds it"
    )


def download(address: str, target: Path) -> None:
    """Download ``address`` to ``target`` with a progress bar; ConvlensError if it fails."""
    import pooch

    with ProgressBar(f"downloading {address.rsplit('/', 1)[-1]}", 1, patience=0.5) as meter:
        try:
            pooch.HTTPDownloader(progressbar=PoochBar(meter), timeout=30)(address, str(target), None)
        except OSError as error:  # requests' errors are OSErrors; those of a server bring its answer
            answer = getattr(error, "response", None)
            reason = f"HTTP {answer.status_code}" if answer is not None else error.strerror
            raise ConvlensError(reason or type(error).__name__) from None


class PoochBar:
    """What pooch expects of a progress bar, shown by our meter."""

    def __init__(self, meter: ProgressBar):
        self._meter = meter

    @property
    def total(self) -> float:
        """The number of bytes to come."""
        return self._meter.total

    @total.setter
    def total(self, value: float) -> None:
        self._meter.total = value

    def update(self, amount: int) -> None:
        """Count ``amount`` bytes as done."""
        self._meter.update(amount)

    def reset(self) -> None:
        """Start to count again."""
        self._meter.done = 0

    def close(self) -> None:
        """Nothing to do: the meter closes itself."""


def unpack_members(archive: Path, members: Sequence[str], size: int) -> dict[str, bytes]:
    """Read ``members`` (base names) of a .tar or .tar.gz into memory; nothing is ever extracted to disk.

    Only regular files of at most ``size`` bytes are read; ConvlensError if one is missing or the archive is bad.
    """
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(read_unpacked(archive)), mode="r:") as tar:
            for entry in tar:
                name = entry.name.rsplit("/", 1)[-1]
                if name in members and entry.isreg() and entry.size <= size:
                    with contextlib.closing(tar.extractfile(entry)) as file:  # type: ignore[type-var]
                        contents[name] = file.read()  # type: ignore[union-attr]
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
        raise ConvlensError(f"{archive} cannot be unpacked: {error}") from None
    if lost := sorted(set(members) - set(contents)):
        raise ConvlensError(f"{archive} does not hold {', '.join(lost)}")
    return contents
