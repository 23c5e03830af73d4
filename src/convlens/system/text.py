"""Short helpers for text in messages and file names."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

LONGEST = 1500  # characters of a message; libraries quote whole files


def quoted(path: object) -> str:
    """Return a path as it must be typed into a shell, so that a command with it can be pasted."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def first_few(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """Return the first names in a row, and how many more there are.

    >>> first_few(["a", "b", "c", "d"], 2)
    'a, b, and 2 more'
    """
    more = len(names) - most
    return separator.join([*names[:most], *([f"and {more:,} more"] if more > 0 else [])])


def cut(text: str, most: int = 60) -> str:
    """Return the end of ``text``, at most so many bytes: a file name holds 255."""
    return text.encode(errors="replace")[-most:].decode(errors="ignore")


def unique(names: list[str]) -> list[str]:
    """Return the names, with a number in those that are there already."""
    taken: dict[str, str] = {}  # in small letters, for file systems that do not tell them apart
    for name in names:
        number, free = 1, name
        while free.lower() in taken:
            number += 1
            free = f"{name[:-4]}-{number}.png"
        taken[free.lower()] = free
    return list(taken.values())
