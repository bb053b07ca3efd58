"""What hosts report of their own caches (ReportEvent), by registered instance: which of them has the beginning of a prompt.

In memory only, as the caches are: a host that a meta server does not know (it was restarted, another one leads, the host was
silent too long) is told so, registers again and sends a snapshot. One bit of a number stands for one host, so that a lookup of
thousands of keys takes one pass over them, however many hosts there are.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, repeat

from meta_server.kvcm.errors import CapacityReached, NodeNotRegistered, SnapshotRateLimited, SnapshotRequired
from meta_server.own_blocks import HostMatch
from meta_server.presence import Clock
from stratakv.errors import InvalidRequest

HOSTS_MAX = 1024
"""Of one instance."""
MEDIA_MAX = 16
"""Of one instance."""
SNAPSHOT_INTERVAL_S = 1.0
"""A host's snapshots of one medium are taken this far apart at least."""

Specs = frozenset[str]
"""Parts of a block that are there; empty: all of it."""


@dataclass(slots=True)
class _Host:
    bit: int
    heard_at: float
    blocks: dict[str, dict[int, Specs]] = field(default_factory=dict)
    """Medium → key → parts."""
    snapshot_at: dict[str, float] = field(default_factory=dict)
    num_snapshots: int = 0
    needs_snapshot: bool = False


class InstanceReports:
    """The hosts of one instance."""

    def __init__(self, wholes: Iterable[Specs], blocks_max: int) -> None:
        """A block is found where one of `wholes` is."""
        self._wholes = tuple(wholes)
        self._blocks_max = blocks_max
        self._hosts: dict[str, _Host] = {}
        self._masks: dict[str, dict[int, int]] = {}
        """Medium → key → a bit for each host that has it whole."""
        self.num_blocks = 0
        """Told of, by all hosts together."""

    def register(self, name: str, now: float) -> None:
        """A host begins, with nothing. Raises CapacityReached."""
        self.drop(name)
        if len(self._hosts) >= HOSTS_MAX:
            raise CapacityReached(f"{HOSTS_MAX} hosts report already")
        used = {host.bit for host in self._hosts.values()}
        self._hosts[name] = _Host(next(bit for bit in range(HOSTS_MAX) if bit not in used), now)

    def heard(self, name: str, now: float) -> None:
        """Raises NodeNotRegistered."""
        self._host(name).heard_at = now

    def add(self, name: str, medium: str, key: int, specs: Specs) -> None:
        """Parts of a block are at a host, beside those it has. Raises NodeNotRegistered, SnapshotRequired, CapacityReached."""
        host = self._complete_host(name)
        self._check_room(host, medium, 1)
        had = host.blocks.get(medium, {}).get(key)
        self._put(host, medium, key, specs if had is None else Specs() if not had or not specs else had | specs)

    def delete(self, name: str, medium: str, key: int, specs: Specs) -> None:
        """Parts of a block are there no longer; without `specs` none is. Raises NodeNotRegistered, SnapshotRequired."""
        host = self._complete_host(name)
        had = host.blocks.get(medium, {}).get(key)
        if had is None:
            return
        left = ((had or Specs().union(*self._wholes)) - specs) if specs else Specs()
        if left:
            self._put(host, medium, key, left)
        else:
            self._take(host, medium, key)

    def snapshot(self, name: str, medium: str, blocks: Sequence[tuple[str, int, Specs]], now: float) -> str:
        """All that a host has on a medium, or on all of them (''): (medium, key, parts) each; the snapshot's version.

        Raises NodeNotRegistered, SnapshotRateLimited, CapacityReached.
        """
        host = self._host(name)
        since = now - host.snapshot_at.get(medium, -SNAPSHOT_INTERVAL_S)
        if since < SNAPSHOT_INTERVAL_S:
            raise SnapshotRateLimited("snapshots come too fast", retry_after_s=SNAPSHOT_INTERVAL_S - since)
        for old in [medium] if medium else list(host.blocks):
            for key in list(host.blocks.get(old, ())):
                self._take(host, old, key)
        host.snapshot_at[medium] = now
        host.needs_snapshot = bool(medium) and host.needs_snapshot
        for where, key, specs in blocks:
            self._check_room(host, where, 1)
            self._put(host, where, key, specs)
        host.num_snapshots += 1
        return str(host.num_snapshots)

    def drop(self, name: str) -> None:
        """A host is gone, with all it had."""
        if (host := self._hosts.get(name)) is not None:
            for medium, blocks in host.blocks.items():
                for key in list(blocks):
                    self._take(host, medium, key)
            del self._hosts[name]

    def expire(self, before: float) -> None:
        """Drop the hosts that were heard of last before then."""
        for name in [name for name, host in self._hosts.items() if host.heard_at < before]:
            self.drop(name)

    def matches(self, keys: Sequence[int], media: frozenset[str]) -> list[HostMatch]:
        """Hosts that have the first block. `media`: only what lies there; empty: anywhere."""
        found = [0] * len(keys)
        for medium, masks in self._masks.items():
            if not media or medium in media:
                found = list(map(operator.or_, found, map(masks.get, keys, repeat(0))))
        total = next((i for i, mask in enumerate(found) if not mask), len(found))
        shared = list(accumulate(found[:total], operator.and_))
        matches = []
        for name, host in self._hosts.items() if total else ():
            bit = 1 << host.bit
            # What all blocks so far have in common only shrinks.
            local = bisect.bisect_left(shared, True, key=lambda mask: not mask & bit)
            if local:
                fetched = sum(not mask & bit for mask in found[local:total])
                matches.append(HostMatch(name, local, fetched, total))
        return matches

    def _host(self, name: str) -> _Host:
        if (host := self._hosts.get(name)) is None:
            raise NodeNotRegistered(f"host {name!r} is not registered here; register it, then send a snapshot")
        return host

    def _complete_host(self, name: str) -> _Host:
        host = self._host(name)
        if host.needs_snapshot:
            raise SnapshotRequired(f"something of host {name!r} was not taken; send a snapshot")
        return host

    def _check_room(self, host: _Host, medium: str, count: int) -> None:
        if medium not in self._masks and len(self._masks) >= MEDIA_MAX:
            raise InvalidRequest(f"there are {MEDIA_MAX} media already", param="medium")
        if self.num_blocks + count > self._blocks_max:
            host.needs_snapshot = True
            raise CapacityReached(f"{self._blocks_max} blocks are reported already")

    def _put(self, host: _Host, medium: str, key: int, specs: Specs) -> None:
        blocks = host.blocks.setdefault(medium, {})
        self.num_blocks += key not in blocks
        blocks[key] = specs
        masks = self._masks.setdefault(medium, {})
        if not specs or any(whole <= specs for whole in self._wholes):
            masks[key] = masks.get(key, 0) | 1 << host.bit
        else:
            self._clear(masks, key, host)

    def _take(self, host: _Host, medium: str, key: int) -> None:
        del host.blocks[medium][key]
        self.num_blocks -= 1
        self._clear(self._masks[medium], key, host)

    def _clear(self, masks: dict[int, int], key: int, host: _Host) -> None:
        left = masks.get(key, 0) & ~(1 << host.bit)
        if left:
            masks[key] = left
        else:
            masks.pop(key, None)


class Reports:
    """Of all instances."""

    def __init__(self, clock: Clock, *, silence_s: float, blocks_max: int) -> None:
        """A host that is silent for so long is gone. `blocks_max`: of one instance."""
        self._clock = clock
        self._silence_s = silence_s
        self._blocks_max = blocks_max
        self._by_instance: dict[str, InstanceReports] = {}

    def of(self, instance_id: str, wholes: Iterable[Specs]) -> InstanceReports:
        """For events; made when the first one comes."""
        reports = self._by_instance.get(instance_id)
        if reports is None:
            reports = self._by_instance[instance_id] = InstanceReports(wholes, self._blocks_max)
        return reports

    def matches(self, instance_id: str, keys: Sequence[int], media: frozenset[str]) -> list[HostMatch]:
        reports = self._by_instance.get(instance_id)
        return reports.matches(keys, media) if reports is not None else []

    def forget(self, instance_id: str) -> None:
        """The instance was removed."""
        self._by_instance.pop(instance_id, None)

    def now(self) -> float:
        return self._clock()

    def tick(self) -> None:
        """Time has passed."""
        for reports in self._by_instance.values():
            reports.expire(self._clock() - self._silence_s)
