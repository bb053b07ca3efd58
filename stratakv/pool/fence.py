"""Which leader of the meta servers is the latest one heard of, so that what leaders of the past say is not obeyed.

A leader that was frozen does not know that it has been succeeded, and may still answer what it was asked before. Daemons learn
of a new term from the leader itself, or from a writer that brings its grant. Thread-safe.
"""

from __future__ import annotations

import threading


class TermFence:
    """The highest term so far; 0 is that of servers which have none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._highest = 0

    def admits(self, term: int) -> bool:
        """Whether no later leader is known; takes note of the term."""
        with self._lock:
            if term < self._highest:
                return False
            self._highest = term
            return True
