"""Where the trials of a sweep are kept: a journal file, or a database by its URL."""

from __future__ import annotations

import os
import re
from pathlib import Path

from optuna.exceptions import OptunaError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from convlens.errors import ConvlensError, UsageError

PASSWORD = re.compile(r"(?<=:)[^:@/]+(?=@)")  # in a URL

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def absolute_storage(text: str) -> str:
    """Return ``--storage`` so that it means the same from any folder; UsageError for a password that would be kept."""
    expanded = os.path.expandvars(text)
    if missing := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise UsageError(f"--storage {text}: there is no {missing[0]} in the environment")
    if "://" not in expanded:
        return str(Path(text).resolve())
    try:
        url = make_url(expanded)
    except (SQLAlchemyError, ValueError) as error:
        raise UsageError(f"--storage {text}: {error}") from None
    if (password := PASSWORD.search(text)) and "$" not in password[0]:
        raise UsageError(
            "--storage: the command is written into the sweep's folder, so a password had better not be in it; put the "
            "URL into the environment and give --storage '$NAME'"
        )
    if url.get_backend_name() == "sqlite" and url.database and not os.path.isabs(url.database) and "$" not in text:
        return f"{url.drivername}:///{Path(url.database).resolve()}"
    return text


class SystemLock(JournalFileOpenLock):
    """A journal's lock that the system itself gives free when a process dies, however it dies.

    Optuna's own locks are files, which a killed process leaves behind for half a minute.
    """

    def __init__(self, path: str):
        super().__init__(path)
        self._path, self._descriptor = f"{path}.lock", -1

    def acquire(self) -> bool:
        """Wait for the lock."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Give it free."""
        os.close(self._descriptor)


def open_storage(text: str) -> BaseStorage:
    """Open a database by URL, or a journal file by its path; ConvlensError if that cannot be done."""
    text = os.path.expandvars(text)
    try:
        if "://" in text:
            waits = {"connect_args": {"timeout": 60}} if text.startswith("sqlite") else {}
            return RDBStorage(text, engine_kwargs=waits)
        Path(text).parent.mkdir(parents=True, exist_ok=True)
        lock = SystemLock(text) if fcntl is not None else JournalFileOpenLock(text)
        return JournalStorage(JournalFileBackend(text, lock_obj=lock))
    except (OptunaError, SQLAlchemyError, ImportError, OSError, ValueError, KeyError, TypeError) as error:
        name = PASSWORD.sub("***", text)
        reason = str(error).strip().split("\n", 1)[0]
        raise ConvlensError(f"cannot open the storage {name}: {reason}") from None
