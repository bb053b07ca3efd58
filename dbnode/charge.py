"""Whether an inference that was made before its statement asked for it is charged. Free of I/O.

What is charged is known later than what it took: when the statement asks for the answer, or has ended without asking.
"""

from __future__ import annotations

from collections.abc import Callable


class Charge:
    """Of one answer, for which there may be several requests."""

    __slots__ = ("_is_due", "_waiting")

    def __init__(self) -> None:
        self._is_due: bool | None = None
        self._waiting: list[Callable[[bool], None]] = []

    def decide(self, is_due: bool) -> None:
        """The first decision stands."""
        if self._is_due is None:
            self._is_due = is_due
            for write in self._waiting:
                write(is_due)
            self._waiting.clear()

    def settle(self, write: Callable[[bool], None]) -> None:
        """A request has ended: `write` is called with the decision as soon as there is one."""
        if self._is_due is None:
            self._waiting.append(write)
        else:
            write(self._is_due)
