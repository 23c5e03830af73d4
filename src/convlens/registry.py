"""A registry: names and the callables (nets, data sets, losses) that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from convlens.errors import UnknownName, UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to entries, refuses a name that is taken, and offers the nearest one for one it lacks (UnknownName).

    >>> nets = Registry[type]("model")
    >>> nets.register("tiny")(int)
    <class 'int'>
    >>> nets["tiny"]
    <class 'int'>
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters its argument as ``name``; UsageError if the name is taken."""

        def enter(entry: T) -> T:
            if name in self._entries:
                raise UsageError(f"{self.kind} {name!r} is registered already; choose another name")
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise UnknownName(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """All names, in the order in which they were registered."""
        return list(self._entries)
