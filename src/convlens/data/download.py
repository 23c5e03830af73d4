"""Find published files on this machine or download them, and verify their digests."""

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

_OFFLINE = ContextVar("offline", default=False)
MAX_UNPACKED_BYTES = 200_000_000  # CIFAR-10's archive, the largest file, unpacks to 184 million


def search_path() -> list[Path]:
    """Return the folders that are searched for data sets, in order."""
    chosen = [Path(p) for p in os.environ.get("CONVLENS_DATA", "").split(os.pathsep) if p]
    return [*chosen, Path("data"), cache_dir(), Path("/usr/share/datasets")]


def find_file(name: str, folders: Sequence[str]) -> Path | None:
    """Return ``name`` or ``name.gz`` from one of ``folders`` below the search path, or None."""
    for root in search_path():
        for folder in folders:
            for path in (root / folder / name, root / folder / f"{name}.gz"):
                if path.is_file():
                    return path
    return None


def read_verified(path: Path, sha256: str) -> bytes:
    """Return the content of a plain or gzipped file; ConvlensError if the SHA-256 of the content is wrong."""
    try:
        content = read_decompressed(path)
    except (OSError, EOFError, zlib.error) as error:
        raise ConvlensError(f"{path} cannot be read: {error}; delete it to download it again") from None
    check_sha256(str(path), content, sha256)
    return content


def read_decompressed(path: Path) -> bytes:
    """Return the content of a plain or gzipped file; OSError if it is larger than any published file."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if is_gzip else open(path, "rb") as file:
        content = file.read(MAX_UNPACKED_BYTES + 1)
    if len(content) > MAX_UNPACKED_BYTES:
        raise OSError(f"it has over {MAX_UNPACKED_BYTES:,} bytes")
    return content


def check_sha256(name: str, content: bytes, sha256: str) -> None:
    """Raise ConvlensError unless ``content``, of the file ``name``, has this SHA-256."""
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ConvlensError(
            f"{name} is not the published file ({len(content):,} bytes, SHA-256 {found[:12]}..., expected "
            f"{sha256[:12]}...); delete or replace it"
        )


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Disable downloads inside the block."""
    token = _OFFLINE.set(True)
    try:
        yield
    finally:
        _OFFLINE.reset(token)


def find_or_download(name: str, sha256: str, folders: Sequence[str], mirrors: Sequence[str]) -> bytes:
    """Return the verified content of a file, from the search path or else from the first mirror that works.

    A download enters the user's cache only after it is complete and verified.

    Args:
        name: The name of the file, without ``.gz``.
        sha256: The digest of its content, uncompressed.
        folders: Where it may be below the folders of the search path. The first is used in the cache.
        mirrors: Addresses of folders that have ``name.gz``.

    Raises:
        ConvlensError: The file is not the published one, or could not be found and downloaded.
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
    raise ConvlensError(not_found_message(name, folders[0], failures))


def not_found_message(name: str, folder: str, failures: Sequence[str]) -> str:
    """Return the message for a file that was neither found nor downloaded."""
    return (
        f"{name} is not on this machine and could not be downloaded ({'; '.join(failures)}); "
        f"put it into data/{folder}/, or point CONVLENS_DATA at the folder that holds it"
    )


def download(address: str, target: Path) -> None:
    """Download ``address`` to ``target`` with a progress bar; ConvlensError if that fails."""
    import pooch

    with ProgressBar(f"downloading {address.rsplit('/', 1)[-1]}", 1, patience=0.5) as progress:
        try:
            pooch.HTTPDownloader(progressbar=PoochBar(progress), timeout=30)(address, str(target), None)
        except OSError as error:  # requests' errors are OSErrors; HTTP errors have the response
            response = getattr(error, "response", None)
            reason = f"HTTP {response.status_code}" if response is not None else error.strerror
            raise ConvlensError(reason or type(error).__name__) from None


class PoochBar:
    """Our progress bar with the interface that pooch expects."""

    def __init__(self, progress: ProgressBar):
        self._progress = progress

    @property
    def total(self) -> float:
        """The number of bytes of the download."""
        return self._progress.total

    @total.setter
    def total(self, value: float) -> None:
        self._progress.total = value

    def update(self, amount: int) -> None:
        """Count ``amount`` bytes as done."""
        self._progress.update(amount)

    def reset(self) -> None:
        """Set the count to 0."""
        self._progress.done = 0

    def close(self) -> None:
        """Do nothing: the progress bar closes itself."""


def unpack_members(archive: Path, members: Sequence[str], max_bytes: int) -> dict[str, bytes]:
    """Read files of a .tar or .tar.gz archive into memory. Nothing is extracted to disk.

    Args:
        archive: The archive.
        members: The base names of the files.
        max_bytes: The largest size of a file. Larger ones, links and devices are ignored.

    Raises:
        ConvlensError: The archive is damaged, or does not have all members.
    """
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(read_decompressed(archive)), mode="r:") as tar:
            for entry in tar:
                name = entry.name.rsplit("/", 1)[-1]
                if name in members and entry.isreg() and entry.size <= max_bytes:
                    with contextlib.closing(tar.extractfile(entry)) as file:  # type: ignore[type-var]
                        contents[name] = file.read()  # type: ignore[union-attr]
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
        raise ConvlensError(f"{archive} cannot be unpacked: {error}") from None
    if missing := sorted(set(members) - set(contents)):
        raise ConvlensError(f"{archive} does not hold {', '.join(missing)}")
    return contents
