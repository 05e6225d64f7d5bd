"""Dictionaries, lists and sets that are put back in place: the same container with the same content."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable

    from autobatch.snapshot.digest import Digest

__all__ = ["Leaf", "Part", "SavedDict", "SavedSequence", "SavedSet", "Slot", "ignore_nothing"]


class Slot(Protocol):
    """What belongs in one place of a container."""

    def live(self) -> object:
        """Return the object to put there."""

    def describe_reference(self, digest: Digest) -> None:
        """Append what is there to the hash."""


class Part:
    """One piece of the state besides tensors. The three steps of a restoration do nothing unless overridden."""

    def __init__(self, *, label: str, number: int) -> None:
        self.label = label
        self.number = number

    def release(self) -> None:
        """Let go of what the job added."""

    def put_back(self) -> None:
        """Put the structure back."""

    def write(self) -> None:
        """Put values back that need the structure."""

    def describe(self, digest: Digest) -> None:
        """Append the content to the hash."""
        raise NotImplementedError

    def describe_reference(self, digest: Digest) -> None:
        """Append which part this is; its content is appended once, by `describe`."""
        digest.add("part number", self.number)


class Leaf:
    """An object that is put back as it is: a number, a string, a function, a tuple."""

    def __init__(self, value: object, children: tuple[Slot, ...] | None = None) -> None:
        self._value = value
        self._children = children

    def live(self) -> object:
        """Return the object itself."""
        return self._value

    def describe_reference(self, digest: Digest) -> None:
        """Append the value, or a tuple's items."""
        if self._children is None:
            digest.add_value(self._value)
            return
        digest.add(type(self._value).__qualname__, len(self._children))
        for child in self._children:
            child.describe_reference(digest)


def ignore_nothing(_key: object) -> bool:
    """Pick no key."""
    return False


class SavedDict(Part):
    """A dictionary and its items in order; keys that `ignore` picks are left as they are found.

    The dictionary is never emptied on the way, so that an interrupt half-way loses nothing that
    a second restoration would not put back.
    """

    def __init__(self, target: dict[Any, Any], *, ignore: Callable[[object], bool], label: str, number: int) -> None:
        super().__init__(label=label, number=number)
        self._target = target
        self._ignore = ignore
        self.items: list[tuple[object, Slot, Slot]] = []
        """Key, the key as the hash reads it, value."""

    def live(self) -> object:
        """Return the very dictionary."""
        return self._target

    def release(self) -> None:
        """Delete keys that were absent."""
        known = {key for key, _, _ in self.items}
        for key in [key for key in self._target if key not in known and not self._ignore(key)]:
            del self._target[key]

    def put_back(self) -> None:
        """Put absent or exchanged values back, and the order of keys."""
        self.release()
        for key, _, slot in self.items:
            value = slot.live()
            if key not in self._target or self._target[key] is not value:
                self._target[key] = value
        present = [key for key in self._target if not self._ignore(key)]
        if any(key is not saved for key, (saved, _, _) in zip(present, self.items, strict=True)):
            for key, _, _ in self.items:
                self._target[key] = self._target.pop(key)

    def describe(self, digest: Digest) -> None:
        """Append keys and values in order."""
        digest.add(type(self._target).__qualname__, len(self.items))
        for _, key, slot in self.items:
            key.describe_reference(digest)
            slot.describe_reference(digest)


class SavedSequence(Part):
    """A list or deque and its items."""

    def __init__(self, target: list[Any] | deque[Any], *, label: str, number: int) -> None:
        super().__init__(label=label, number=number)
        self._target = target
        self.items: list[Slot] = []

    def live(self) -> object:
        """Return the very list or deque."""
        return self._target

    def put_back(self) -> None:
        """Fill it afresh where any item is another object."""
        values = [slot.live() for slot in self.items]
        if len(values) != len(self._target) or any(a is not b for a, b in zip(values, self._target, strict=True)):
            self._target.clear()
            self._target.extend(values)

    def describe(self, digest: Digest) -> None:
        """Append the items in order."""
        digest.add(type(self._target).__qualname__, len(self.items))
        for slot in self.items:
            slot.describe_reference(digest)


class SavedSet(Part):
    """A set and its elements, which are put back as they are."""

    def __init__(self, target: set[Any], *, label: str, number: int) -> None:
        super().__init__(label=label, number=number)
        self._target = target
        self._elements = set(target)

    def live(self) -> object:
        """Return the very set."""
        return self._target

    def put_back(self) -> None:
        """Remove what was added, add what was removed."""
        self._target &= self._elements
        self._target |= self._elements

    def describe(self, digest: Digest) -> None:
        """Append the elements, sorted."""
        digest.add_value(self._elements)
