"""Registries of models, data sets and recipes by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from convlens.errors import UnknownNameError, UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from names to entries. Unknown names raise UnknownNameError, which suggests the nearest name.

    Args:
        kind: What the entries are, for messages.

    >>> models = Registry[type]("model")
    >>> models.register("tiny")(int)
    <class 'int'>
    >>> models["tiny"]
    <class 'int'>
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}
        self.families: dict[str, Callable[[str], T]] = {}  # by prefix of their names

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its argument as ``name``; UsageError if the name is taken."""

        def enter(entry: T) -> T:
            if name in self._entries:
                raise UsageError(f"{self.kind} {name!r} is registered already; choose another name")
            self._entries[name] = entry
            return entry

        return enter

    def family(self, prefix: str) -> Callable[[Callable[[str], T]], Callable[[str], T]]:
        """Return a decorator for a function that finds the entry of a name from the part after ``prefix``."""

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
        """Return all names in the order of registration, without those of families."""
        return list(self._entries)
