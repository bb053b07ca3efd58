"""How long puts may be written, kept by transports whose writes the daemon does not see."""

from __future__ import annotations

import time

from stratakv.pool.errors import PutRefused


class PutTimes:
    """Put → until when; thread-safe, as every step is one operation on a dictionary."""

    def __init__(self) -> None:
        self._deadlines: dict[bytes, float] = {}

    def opened(self, put_id: bytes, deadline: float) -> None:
        """The daemon granted pages; puts out of time are forgotten."""
        now = time.monotonic()
        for known, ends in list(self._deadlines.items()):
            if ends < now:
                self._deadlines.pop(known, None)
        self._deadlines[put_id] = deadline

    def closed(self, put_id: bytes) -> None:
        self._deadlines.pop(put_id, None)

    def deadline(self, put_id: bytes) -> float:
        """0 for a put that is unknown or over."""
        return self._deadlines.get(put_id, 0.0)

    def check(self, put_id: bytes) -> None:
        """Raises PutRefused."""
        if self.deadline(put_id) < time.monotonic():
            raise PutRefused("this put is unknown, over or out of time")
