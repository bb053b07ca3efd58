"""P2 and P4 and the fault table of two-phase writes, for any order of requests, failures and restarts."""

from __future__ import annotations

import contextlib
import hashlib
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stratakv import wire
from stratakv.errors import InvalidRequest, Overloaded, StrataError, Unavailable
from tests.pool_world import NAMESPACE, PAGE_BYTES, Daemon, Fault, World

CHAINS, CHAIN_BLOCKS = 3, 6
DAEMON_PAGES = 8
DISK_PAGES = 12


def chain_key(chain: int, block: int) -> bytes:
    return hashlib.sha256(f"{chain}/{block}".encode()).digest()


KEYS = [[chain_key(chain, block) for block in range(CHAIN_BLOCKS)] for chain in range(CHAINS)]
chains, lengths, indexes = st.integers(0, CHAINS - 1), st.integers(1, CHAIN_BLOCKS), st.integers(0, 1000)


class Writer:
    """One put as its writer sees it."""

    def __init__(self, put_id: bytes, keys: list[bytes], grant: wire.PutGrant, daemon: Daemon) -> None:
        assert grant.segment is not None
        self.put_id = put_id
        self.keys = [keys[i] for i in grant.wanted]
        self.epoch = grant.segment.epoch
        self.extents = daemon.allocate(put_id, len(self.keys))
        daemon.keys.update(zip(self.extents, self.keys, strict=True))
        self.end_sent = False


class PoolMachine(RuleBasedStateMachine):
    """Random writers, readers, daemons and a flaky database."""

    NODES: ClassVar[tuple[str, ...]] = ("a", "b")
    LEVELS: ClassVar[dict[str, float]] = {
        "reclaim_high": 0.8,
        "reclaim_low": 0.5,
        "demote_high": 0.3,
        "demote_low": 0.1,
    }

    def __init__(self) -> None:
        super().__init__()
        self.world = World(lease_s_max=10.0, put_timeout_s_max=30.0, **self.LEVELS)
        self.writers: list[Writer] = []
        self.num_puts = 0
        self.leases: dict[int, tuple[float, list[wire.Place]]] = {}
        self.may_be_found: set[bytes] = set()
        """Keys whose put_end was sent."""

    def next_owner(self) -> int:
        """Whose the pages of the next put are."""
        return 0

    def teardown(self) -> None:
        self.world.store.fault = Fault.NONE
        self.world.settle()
        committed = self.world.stats().bytes_committed
        used = sum(daemon.used_bytes for daemon in self.world.daemons.values())
        assert used == committed, "P4: at rest, bytes used = committed"
        for keys in KEYS:
            match = self.world.call(wire.MatchPrefix(NAMESPACE, b"".join(keys), 1.0), wire.Match)
            for place in match.places():
                held = self.world.daemons[place.node].held
                assert wire.Extent(place.offset, place.generation) in held, "what is found is not freed"
        self.world.close()

    @initialize()
    def start_daemons(self) -> None:
        for name in self.NODES:
            self.world.start_daemon(name, pages=DAEMON_PAGES)
        self.world.start_disk("a", pages=DISK_PAGES)

    @rule(chain=chains, length=lengths)
    def write_whole(self, chain: int, length: int) -> None:
        before = len(self.writers)
        self.put_start(chain, length, None)
        if len(self.writers) > before:
            self.put_end(before)

    @rule(chain=chains, length=lengths, prefer=st.sampled_from(["a", "b", None]))
    def put_start(self, chain: int, length: int, prefer: str | None) -> None:
        self.num_puts += 1
        put_id, keys = self.num_puts.to_bytes(16, "big"), KEYS[chain][:length]
        owner = self.next_owner()
        request = wire.PutStart(put_id, NAMESPACE, b"".join(keys), PAGE_BYTES, 16, prefer, timeout_s=20.0, owner=owner)
        try:
            grant = self.world.call(request, wire.PutGrant)
        except (Overloaded, Unavailable):
            return
        if grant.segment is not None:
            self.writers.append(Writer(put_id, keys, grant, self.world.daemons[grant.segment.node]))
            assert self.world.call(request, wire.PutGrant) == grant, "a repeated put_start returns the same grant"

    @precondition(lambda self: self.writers)
    @rule(index=indexes)
    def put_end(self, index: int) -> None:
        writer = self.writers[index % len(self.writers)]
        self.may_be_found.update(writer.keys)
        try:
            self.world.call(wire.PutEnd(writer.put_id, writer.epoch, writer.extents), wire.Done)
        except Unavailable:
            writer.end_sent = True
            return
        except StrataError:
            self.writers.remove(writer)
            return
        self.writers.remove(writer)
        self.world.store.fault = Fault.NONE
        self.world.call(wire.PutEnd(writer.put_id, writer.epoch, writer.extents), wire.Done)

    @precondition(lambda self: self.writers)
    @rule(index=indexes)
    def put_revoke(self, index: int) -> None:
        writer = self.writers[index % len(self.writers)]
        try:
            self.world.call(wire.PutRevoke(writer.put_id), wire.Done)
        except Unavailable:
            return
        except StrataError:
            assert writer.end_sent, "only a put whose end was sent can be finished"
        self.writers.remove(writer)

    @rule(
        chain=chains, length=lengths, lease_s=st.sampled_from([0.0, 1.0, 8.0]), reader=st.sampled_from(["", "a", "b"])
    )
    def match(self, chain: int, length: int, lease_s: float, reader: str) -> None:
        keys = KEYS[chain][:length]
        match = self.world.call(wire.MatchPrefix(NAMESPACE, b"".join(keys), lease_s, reader), wire.Match)
        assert set(keys[: match.num_blocks]) <= self.may_be_found, "P2: found only after put_end"
        if match.lease_id:
            assert len(match.places()) == match.num_blocks
            self.leases[match.lease_id] = (self.world.now + lease_s, match.places())

    @precondition(lambda self: self.leases)
    @rule(index=indexes)
    def release(self, index: int) -> None:
        lease_id = list(self.leases)[index % len(self.leases)]
        del self.leases[lease_id]
        self.world.call(wire.ReleaseLease(lease_id), wire.Done)

    @precondition(lambda self: self.leases)
    @rule(index=indexes)
    def report_corrupt(self, index: int) -> None:
        place = list(self.leases.values())[index % len(self.leases)][1][0]
        for keys in KEYS:
            self.world.call(wire.ReportCorrupt(NAMESPACE, keys[0], place), wire.Done)

    @precondition(lambda self: self.world.stats().blocks > 6)
    @rule()
    def flush(self) -> None:
        # With the database away the flush is not confirmed; it happened all the same.
        with contextlib.suppress(Unavailable):
            self.world.call(wire.Flush(), wire.Flushed)

    @rule(seconds=st.sampled_from([0.5, 4.0, 25.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.now += seconds
        self.leases = {i: lease for i, lease in self.leases.items() if lease[0] > self.world.now}
        self.world.now -= seconds
        self.world.store.fault = Fault.NONE
        self.world.tick(seconds)

    @rule(name=st.sampled_from(["a", "b"]))
    def restart_daemon(self, name: str) -> None:
        if self.world.store.fault is Fault.NONE:
            epoch = self.world.daemons[name].segment.epoch
            self.world.start_daemon(name, pages=DAEMON_PAGES)
            self.leases = {
                i: (until, [p for p in places if p.node != name]) for i, (until, places) in self.leases.items()
            }
            self.leases = {i: lease for i, lease in self.leases.items() if lease[1]}
            for writer in [w for w in self.writers if w.epoch == epoch]:
                # One whose end was sent may have been finished before: repeating that is success.
                refused = contextlib.suppress(StrataError) if writer.end_sent else pytest.raises(StrataError)
                with refused:
                    self.world.call(wire.PutEnd(writer.put_id, epoch, writer.extents), wire.Done)
                self.writers.remove(writer)

    @precondition(lambda self: self.num_puts % 4 == 0)
    @rule()
    def restart_meta_server(self) -> None:
        self.world.restart()

    @rule(chain=chains, length=lengths)
    def write_to_a_and_demote(self, chain: int, length: int) -> None:
        before = len(self.writers)
        self.put_start(chain, length, "a")
        if len(self.writers) > before:
            self.put_end(before)
        self.move_pages()

    @rule()
    def move_pages(self) -> None:
        for name in ("a", "a/disk"):
            with contextlib.suppress(Unavailable):
                self.world.heartbeat(self.world.daemons[name])
        self.world.carry_out_moves()

    @rule(name=st.sampled_from(["a", "b"]), is_draining=st.booleans(), is_whole=st.booleans())
    def drain(self, name: str, is_draining: bool, is_whole: bool) -> None:
        with contextlib.suppress(InvalidRequest):  # not alive just now
            self.world.drain(name, is_draining=is_draining, is_whole=is_whole)

    @rule(name=st.sampled_from(["a", "b"]), pages=st.integers(0, DAEMON_PAGES))
    def limit(self, name: str, pages: int) -> None:
        self.world.call(wire.SetNodeLimit(name, pages * PAGE_BYTES), wire.Done)

    @rule(name=st.sampled_from(["a", "b", "a/disk"]), is_finished=st.booleans())
    def copy_away(self, name: str, is_finished: bool) -> None:
        """A draining daemon begins to copy pages to another; what becomes of the put is as open as for any writer's."""
        source = self.world.daemons[name]
        with contextlib.suppress(Unavailable):
            self.world.heartbeat(source)
        self.num_puts += 1
        put_id = self.num_puts.to_bytes(16, "big")
        try:
            keys, grant = self.world.start_copies(source, put_id)
        except (Overloaded, Unavailable):
            return
        if grant.segment is not None:
            assert grant.segment.node in {*self.NODES} - {name}
            self.writers.append(Writer(put_id, keys, grant, self.world.daemons[grant.segment.node]))
            if is_finished:
                self.put_end(len(self.writers) - 1)

    @rule(lost=indexes)
    def restart_disk(self, lost: int) -> None:
        """Its daemon has ended and come back, and has found one page damaged."""
        disk = self.world.daemons["a/disk"]
        if self.world.store.fault is Fault.NONE and disk.held and disk.report is None:
            gone = list(disk.held)[lost % len(disk.held)]
            del disk.held[gone]
            disk.moves = [move for move in disk.moves if move.extent != gone]
            self.leases = {
                i: lease
                for i, lease in self.leases.items()
                if all((p.node, p.offset, p.generation) != ("a/disk", gone.offset, gone.generation) for p in lease[1])
            }
            self.world.register_disk(disk)

    @rule(fault=st.sampled_from([Fault.BEFORE, Fault.AFTER]))
    def break_next_write(self, fault: Fault) -> None:
        self.world.store.fault = fault

    @invariant()
    def leased_pages_keep_their_extents(self) -> None:
        for until, places in self.leases.values():
            for place in places:
                extent = wire.Extent(place.offset, place.generation)
                assert until <= self.world.now or extent in self.world.daemons[place.node].held


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40)
