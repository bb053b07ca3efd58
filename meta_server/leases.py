"""Read leases: pages that a reader was told of and that must not be reclaimed while it reads. Kept in memory only."""

from __future__ import annotations

import heapq
import math
import secrets
from dataclasses import dataclass

import numpy as np

from meta_server.index import BlockIndex
from meta_server.presence import Clock
from meta_server.slots import SlotArray
from stratakv.errors import InvalidRequest, Overloaded


@dataclass(frozen=True, slots=True)
class _Lease:
    slots: SlotArray
    until: float


class LeaseTable:
    """Leases by id; ids never repeat, also not across restarts."""

    def __init__(self, index: BlockIndex, clock: Clock, *, leases_max: int, lease_s_max: float) -> None:
        self._index = index
        self._clock = clock
        self._leases_max = leases_max
        self._lease_s_max = lease_s_max
        self._leases: dict[int, _Lease] = {}
        self._by_end: list[tuple[float, int]] = []
        self._next_id = secrets.randbits(62) | 1

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, slots: SlotArray, lease_s: float) -> int:
        """Pin the pages for `lease_s`, at most the configured maximum. Raises InvalidRequest, Overloaded."""
        if not math.isfinite(lease_s) or lease_s <= 0:
            raise InvalidRequest(f"lease_s must be a positive number, got {lease_s}", param="lease_s")
        if len(self._leases) >= self._leases_max:
            raise Overloaded(f"{self._leases_max} read leases are held already")
        until = self._clock() + min(lease_s, self._lease_s_max)
        lease_id, self._next_id = self._next_id, self._next_id + 1
        self._index.pin(slots)
        self._leases[lease_id] = _Lease(slots, until)
        heapq.heappush(self._by_end, (until, lease_id))
        return lease_id

    def release(self, lease_id: int) -> list[SlotArray]:
        """Give a lease back; unknown ones (expired before) are fine. Slots that `BlockIndex.unpin` returned."""
        lease = self._leases.pop(lease_id, None)
        if len(self._by_end) > 2 * len(self._leases) + 1024:
            self._by_end = [entry for entry in self._by_end if entry[1] in self._leases]
            heapq.heapify(self._by_end)
        return [self._index.unpin(lease.slots)] if lease is not None else []

    def follow(self, old: SlotArray, new: SlotArray) -> list[SlotArray]:
        """Pages have moved from the slots `old` to `new`: hold them there. Slots as of `release`."""
        to = dict(zip(old.tolist(), new.tolist(), strict=True))
        gone: list[SlotArray] = []
        for lease_id, lease in self._leases.items():
            if np.isin(lease.slots, old).any():
                slots = np.array([to.get(slot, slot) for slot in lease.slots.tolist()], np.int64)
                self._index.pin(slots)
                gone.append(self._index.unpin(lease.slots))
                self._leases[lease_id] = _Lease(slots, lease.until)
        return gone

    def expire(self) -> list[SlotArray]:
        """End the leases whose time is over; as `release`."""
        gone: list[SlotArray] = []
        while self._by_end and self._by_end[0][0] <= self._clock():
            gone += self.release(heapq.heappop(self._by_end)[1])
        return gone
