"""Where packed data lie, a folder or an address, and how their files are got from there."""

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

INDEX = "index.json"  # what lies there, and each file's SHA-256

TRIES = 3  # to get a file over the network

TIMEOUT_SECONDS = 30.0  # seconds for it to begin, or go on


@dataclass(frozen=True)
class ShardStorage:
    """Where shards lie: a folder, or an address that begins with http:// or https://."""

    path: str

    def read(self, file: str, sha256: str | None, most: int) -> bytes:
        """Return a file's content; ConvlensError names it if it is missing, too large, or not what was packed."""
        where = f"{self.path.rstrip('/')}/{file}"
        content = read_address(where, most) if is_address(self.path) else read_file(where, most)
        if len(content) > most:
            raise ConvlensError(f"the shard {where} is larger than it may be: {most:,} bytes")
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise ConvlensError(f"the shard {where} is damaged: its SHA-256 is not that in {INDEX}; copy it anew")
        return content

    def read_index(self) -> dict[str, Any]:
        """Return what stands in ``index.json``; ConvlensError if it is missing, too large, or no object."""
        where = f"{self.path.rstrip('/')}/{INDEX}"
        if not is_address(self.path):
            return read_json(Path(where))
        content = read_address(where, MAX_JSON_BYTES)
        if len(content) > MAX_JSON_BYTES:
            raise ConvlensError(f"{where} is larger than it may be: {MAX_JSON_BYTES:,} bytes")
        return parse_json(content, where)


def is_address(source: str) -> bool:
    """Say whether data are asked for over the network."""
    return source.startswith(("http://", "https://"))


def read_file(path: str, most: int) -> bytes:
    """Return a file's content, or its first ``most`` bytes and one more; ConvlensError if it cannot be read."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ConvlensError(f"the shard {path} is no file")
        with open(path, "rb") as file:
            return file.read(min(most, os.fstat(file.fileno()).st_size) + 1)
    except OSError as error:
        raise ConvlensError(f"the shard {path} cannot be read: {error.strerror}; copy it anew") from None


def read_address(address: str, most: int) -> bytes:
    """Return what lies at an address, or its first ``most`` bytes and one more; ConvlensError after three tries."""
    for left in reversed(range(TRIES)):
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:
                content: bytes = answer.read(most + 1)
                if len(content) >= min(int(answer.headers.get("Content-Length", 0)), most + 1):
                    return content
                reason = "it came only in part"
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.reason}"
            if error.code < 500:  # asking again would not help
                break
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error))
        if left:
            threading.Event().wait(0.5)
    raise ConvlensError(f"{address} cannot be had: {reason}")
