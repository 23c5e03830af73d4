"""Where Optuna keeps the trials of a sweep: a journal file in its folder, or a database."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna import Study
from optuna.exceptions import OptunaError, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from convlens.errors import ConvlensError, UsageError

PASSWORD = re.compile(r"(?<=:)[^:@/]+(?=@)")  # in a URL
HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60  # without a heartbeat, before a trial of a database is repeated
LOCK_GRACE_SECONDS = 10  # before the lock of a process that was killed while it wrote to a journal is broken
MAX_RETRIES = 2  # of a trial whose process dies: it may be the cause
DATABASE_ERRORS = (StorageInternalError, SQLAlchemyError)


def retry_callback(max_retries: int | None) -> Callable[[Study, FrozenTrial], None]:
    """Return Optuna's callback that queues the values of a failed trial again, at most ``max_retries`` times."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental
        return RetryHeartbeatStaleTrialCallback(max_retry=max_retries)


class TornLineLock(JournalFileOpenLock):
    """The lock of a journal file; it also cuts a last line that a full disk or a power failure left incomplete."""

    def __init__(self, path: str):
        super().__init__(path, LOCK_GRACE_SECONDS)
        self._path = path

    def acquire(self) -> bool:
        """Wait for the lock, then cut an incomplete last line: appending to it would make the journal unreadable."""
        super().acquire()
        with open(self._path, "rb+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        return True


class Database(RDBStorage):
    """A database with heartbeats; one that the server misses while it restarts is not an error."""

    def record_heartbeat(self, trial_id: int) -> None:
        """Record that the trial is alive, if the database can be reached."""
        try:
            super().record_heartbeat(trial_id)
        except DATABASE_ERRORS:
            pass  # the next heartbeat may get through


def absolute_storage(text: str) -> str:
    """Return a database URL that means the same from every folder, with its ``$NAME`` unexpanded.

    Raises UsageError if it is not a URL, a variable is not set, or it has a password, which would be written to disk.
    """
    expanded = os.path.expandvars(text)
    if missing := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise UsageError(f"storage {text}: there is no {missing[0]} in the environment")
    if (password := PASSWORD.search(text)) and "$" not in password[0]:
        raise UsageError(
            "the command is written into the sweep's folder, so the storage must not contain a password: put the URL "
            "into an environment variable and give '$NAME'"
        )
    try:
        url = make_url(expanded)
    except (SQLAlchemyError, ValueError):
        raise UsageError(f"storage {text}: give a database URL, such as sqlite:///trials.db") from None
    if url.get_backend_name() == "sqlite" and url.database and not os.path.isabs(url.database) and "$" not in text:
        return f"{url.drivername}:///{Path(url.database).resolve()}"
    return text


def open_storage(text: str) -> BaseStorage:
    """Open a database by its URL, or a journal file by its path; ConvlensError if that fails."""
    text = os.path.expandvars(text)
    try:
        if "://" not in text:
            return JournalStorage(JournalFileBackend(text, lock_obj=TornLineLock(text)))
        options: dict[str, Any] = {"pool_pre_ping": True}  # replaces connections that a server restart closed
        if text.startswith("sqlite"):
            options["connect_args"] = {"timeout": 60}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # heartbeats are experimental
            return Database(
                text,
                options,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=retry_callback(MAX_RETRIES),
            )
    except (OptunaError, SQLAlchemyError, ImportError, OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ConvlensError(f"cannot open the storage {PASSWORD.sub('***', text)}: {reason}") from None
