"""Grants in Python, for where the C++ module was not built; `base.Grants` says what each method does."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from stratakv._native.base import Entered, UInt32s, UInt64s


@dataclass(slots=True)
class _Grant:
    starts: UInt64s
    ends: UInt64s
    deadline: float
    num_writers: int = 0
    is_closed: bool = False

    def covers(self, offsets: UInt64s, sizes: UInt32s) -> bool:
        """Whether every range lies within one run."""
        run = np.searchsorted(self.starts, offsets, side="right").astype(np.int64) - 1
        if (run < 0).any():
            return False
        ends = self.ends[run]
        return bool(((offsets < ends) & (sizes <= ends - offsets)).all())


class Grants:
    """A dictionary with a lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._grants: dict[bytes, _Grant] = {}

    def open(self, put_id: bytes, starts: UInt64s, ends: UInt64s, deadline: float, /) -> None:
        with self._lock:
            grant = _Grant(starts, ends, deadline)
            known = self._grants.get(put_id)
            if known is not None:
                grant.num_writers = known.num_writers
            self._grants[put_id] = grant

    def close(self, put_id: bytes, /) -> bool:
        with self._lock:
            grant = self._grants.get(put_id)
            if grant is None:
                return True
            grant.is_closed = True
            if not grant.num_writers:
                del self._grants[put_id]
            return not grant.num_writers

    def enter(self, put_id: bytes, offsets: UInt64s, sizes: UInt32s, now: float, /) -> int:
        with self._lock:
            grant = self._grants.get(put_id)
            if grant is None or grant.is_closed or grant.deadline < now:
                return Entered.REFUSED
            if not grant.covers(offsets, sizes):
                return Entered.OUTSIDE
            grant.num_writers += 1
            return Entered.YES

    def leave(self, put_id: bytes, /) -> None:
        with self._lock:
            grant = self._grants.get(put_id)
            if grant is not None and grant.num_writers:
                grant.num_writers -= 1
                if grant.is_closed and not grant.num_writers:
                    del self._grants[put_id]
