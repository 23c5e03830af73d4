"""Short helpers for text in messages and file names."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

MAX_MESSAGE_CHARS = 1500  # other libraries quote whole files


def quoted(path: object) -> str:
    """Quote a path for a shell command."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def first_few(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """Join the first names, and say how many more there are.

    >>> first_few(["a", "b", "c", "d"], 2)
    'a, b, and 2 more'
    """
    more = len(names) - most
    return separator.join([*names[:most], *([f"and {more:,} more"] if more > 0 else [])])


def cut(text: str, most: int = 60) -> str:
    """Return the last bytes of ``text``, at most ``most``, because a file name has at most 255."""
    return text.encode(errors="replace")[-most:].decode(errors="ignore")


def unique(names: list[str]) -> list[str]:
    """Number duplicate names of .png files, so that all are different."""
    taken: dict[str, str] = {}  # lower case, because some file systems ignore case
    for name in names:
        number, free = 1, name
        while free.lower() in taken:
            number += 1
            free = f"{name[:-4]}-{number}.png"
        taken[free.lower()] = free
    return list(taken.values())
