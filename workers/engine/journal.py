"""What L1 got and lost, for whoever wants to tell others. Written by the engine's thread, taken by one other thread."""

from __future__ import annotations

from collections import deque

from stratakv.keys import BlockKey

CHANGES_MAX = 100_000
"""Not taken; beyond it the journal is useless until somebody looks at the whole cache."""


class BlockJournal:
    """Changes in order; a deque's ends are safe without a lock."""

    def __init__(self, changes_max: int = CHANGES_MAX) -> None:
        self._changes: deque[tuple[BlockKey, bool]] = deque()
        self._changes_max = changes_max
        self._overflowed = False

    def added(self, key: BlockKey) -> None:
        self._note(key, is_held=True)

    def removed(self, key: BlockKey) -> None:
        self._note(key, is_held=False)

    def take(self) -> list[tuple[BlockKey, bool]] | None:
        """Keys and whether they are held now, oldest first; None if changes were lost."""
        if self._overflowed:
            self._overflowed = False
            self._changes.clear()
            return None
        return [self._changes.popleft() for _ in range(len(self._changes))]

    def _note(self, key: BlockKey, *, is_held: bool) -> None:
        if len(self._changes) < self._changes_max:
            self._changes.append((key, is_held))
        else:
            self._overflowed = True
