"""Read the files of a sharded data set from a folder or over HTTP."""

from __future__ import annotations

import hashlib
import http.client
import os
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convlens.errors import ConvlensError
from convlens.system.files import MAX_JSON_BYTES, parse_json, read_json

INDEX = "index.json"  # lists the files and their SHA-256
MAX_TRIES = 3
RETRY_SECONDS = 0.5
TIMEOUT_SECONDS = 30.0  # without an answer


@dataclass(frozen=True)
class ShardStorage:
    """The folder of the shards, or its http(s) address."""

    path: str

    def read(self, file: str, sha256: str, max_bytes: int) -> bytes:
        """Return the content of a file; ConvlensError if it is missing, too large or has another digest."""
        location = f"{self.path.rstrip('/')}/{file}"
        content = read_address(location, max_bytes) if is_address(self.path) else read_file(location, max_bytes)
        if len(content) > max_bytes:
            raise ConvlensError(f"the shard {location} is larger than the expected {max_bytes:,} bytes")
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ConvlensError(f"the shard {location} is damaged: its SHA-256 is not that in {INDEX}; copy it again")
        return content

    def read_index(self) -> dict[str, Any]:
        """Return the content of ``index.json``; ConvlensError if it is missing, too large or not a JSON object."""
        location = f"{self.path.rstrip('/')}/{INDEX}"
        if not is_address(self.path):
            return read_json(Path(location))
        content = read_address(location, MAX_JSON_BYTES)
        if len(content) > MAX_JSON_BYTES:
            raise ConvlensError(f"{location} is larger than {MAX_JSON_BYTES:,} bytes")
        return parse_json(content, location)


def is_address(source: str) -> bool:
    """Return True if ``source`` is an http(s) address."""
    return source.startswith(("http://", "https://"))


def read_file(path: str, max_bytes: int) -> bytes:
    """Return the content of a file, at most ``max_bytes`` and one more byte; ConvlensError if it cannot be read."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ConvlensError(f"the shard {path} is not a file")
        with open(path, "rb") as file:
            return file.read(min(max_bytes, os.fstat(file.fileno()).st_size) + 1)
    except OSError as error:
        raise ConvlensError(f"the shard {path} cannot be read: {error.strerror}; copy it again") from None


def read_address(address: str, max_bytes: int) -> bytes:
    """Download at most ``max_bytes`` and one more byte; ConvlensError after three failures."""
    for remaining in reversed(range(MAX_TRIES)):
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as response:
                content: bytes = response.read(max_bytes + 1)
                if len(content) >= min(int(response.headers.get("Content-Length", 0)), max_bytes + 1):
                    return content
                reason = "the connection closed early"
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.reason}"
            if error.code < 500:  # retrying would not help
                break
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error))
        if remaining:
            threading.Event().wait(RETRY_SECONDS)
    raise ConvlensError(f"{address} cannot be downloaded: {reason}")
