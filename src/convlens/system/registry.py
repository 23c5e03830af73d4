"""A registry: names, and whole families of names, and the callables (nets, data sets, losses) they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from convlens.errors import UnknownNameError, UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """Map names to entries, refuse a name that is taken, suggest the nearest for an unknown one (UnknownNameError).

    >>> nets = Registry[type]("model")
    >>> nets.register("tiny")(int)
    <class 'int'>
    >>> nets["tiny"]
    <class 'int'>
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}
        self.families: dict[str, Callable[[str], T]] = {}  # by what their names begin with

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters its argument as ``name``; UsageError if the name is taken."""

        def enter(entry: T) -> T:
            if name in self._entries:
                raise UsageError(f"{self.kind} {name!r} is registered already; choose another name")
            self._entries[name] = entry
            return entry

        return enter

    def family(self, prefix: str) -> Callable[[Callable[[str], T]], Callable[[str], T]]:
        """Return a decorator for what finds the entry of any name that begins with ``prefix``; it gets what follows."""

        def enter(find: Callable[[str], T]) -> Callable[[str], T]:
            self.families[prefix] = find
            return find

        return enter

    def __getitem__(self, name: str) -> T:
        for prefix, find in self.families.items():
            if str(name).startswith(prefix):
                return find(name.removeprefix(prefix))
        if name not in self._entries:
            raise UnknownNameError(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries or str(name).startswith(tuple(self.families))

    def names(self) -> list[str]:
        """All names, in the order in which they were registered; those of families are not listed."""
        return list(self._entries)
