"""Two-phase writes: room is granted, pages are written elsewhere, and only the durable `PutEnd` makes them visible.

    PENDING ── end ──► ENDING ── written ──► committed (visible)
       │                  └── database lost: PENDING again, outcome open, asked for again by the next end, revoke or expiry
       └── revoke, expiry ──► VOIDING ── written ──► void

PostgreSQL decides: each step is a conditional update there, and what it says is what happens here.
"""

from __future__ import annotations

import asyncio
import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass

from meta_server.catalog import Catalog
from meta_server.journal import Decided, Journal
from meta_server.nodes import Node
from meta_server.owners import NOBODY
from meta_server.page_arrays import ExtentArray
from meta_server.placement import Placement
from meta_server.presence import Clock
from meta_server.records import StartedPut, extent_array, extent_list, pack_extents, unpack_extents
from meta_server.replicas import Replicas
from meta_server.store import DECIDED_MAX, STATEMENT_TIMEOUT_S, Store
from stratakv.errors import InvalidRequest, Overloaded, Unavailable
from stratakv.keys import KEY_BYTES, BlockKey, unpack_keys
from stratakv.log import EventLogger
from stratakv.pool.meta_errors import PutFinished, PutUnknown, StaleEpoch
from stratakv.settings import MetaSettings
from stratakv.wire import PutEnd, PutGrant, PutStart

_COMMITTED = "committed"
_log = EventLogger("meta_server.puts")


class PutState(enum.Enum):
    """Where an undecided put stands."""

    PENDING = enum.auto()
    ENDING = enum.auto()
    VOIDING = enum.auto()


@dataclass(slots=True)
class _Put:
    row: StartedPut
    node: Node
    keys: list[BlockKey]
    deadline: float
    cost_us: int = 0
    source: Node | None = None
    """Where the pages lie of which these are copies."""
    is_replica: bool = False
    """The pages stay there, too."""
    state: PutState = PutState.PENDING
    extents: bytes = b""
    """As the writer sent them; kept while the outcome is open."""
    decided: Decided | None = None

    @property
    def size_bytes(self) -> int:
        return len(self.keys) * self.row.page_bytes


class PutTable:
    """The undecided puts, and what became of the latest others."""

    def __init__(
        self,
        catalog: Catalog,
        journal: Journal,
        store: Store,
        clock: Clock,
        settings: MetaSettings,
        placement: Placement,
        replicas: Replicas,
    ) -> None:
        self._catalog = catalog
        self._journal = journal
        self._store = store
        self._clock = clock
        self._settings = settings
        self._placement = placement
        self._replicas = replicas
        self._puts: dict[bytes, _Put] = {}
        self._pending_keys: dict[bytes, set[BlockKey]] = {}
        self._decided: dict[bytes, str] = {}

    def __len__(self) -> int:
        return len(self._puts)

    def restore(self, rows: Iterable[StartedPut], nodes: dict[bytes, Node], decided: dict[bytes, str]) -> None:
        """Take up the puts of the snapshot, with the time they have left."""
        self._decided.update(decided)
        for row in rows:
            self._add(row, nodes[row.epoch])

    def start(self, request: PutStart) -> PutGrant:
        """Grant room for the missing pages, or for the first of them that fit.

        Raises PutFinished, PutUnknown, PoolFull, Overloaded, Unavailable, InvalidRequest.
        """
        known = self._puts.get(request.put_id)
        if known is not None:
            return self._grant_again(known, request)
        if request.put_id in self._decided:
            self._refuse_decided(self._decided[request.put_id])
        if not math.isfinite(request.timeout_s) or request.timeout_s <= 0:
            raise InvalidRequest(f"timeout_s must be a positive number, got {request.timeout_s}", param="timeout_s")
        keys = unpack_keys(request.keys)
        source = self._catalog.nodes.get(request.copies_from)
        wanted, owner = self._wanted(request, source, keys)
        if not wanted:
            return PutGrant(wanted=[])
        self._journal.check_room()
        if len(self._puts) >= self._settings.puts_pending_max:
            raise Overloaded(f"{self._settings.puts_pending_max} puts are in progress already")
        node, wanted = self._room(request, source, wanted)
        if node is None or not wanted:
            return PutGrant(wanted=[])
        row = StartedPut(
            put_id=request.put_id,
            namespace=request.namespace,
            epoch=node.segment.epoch,
            worker=request.worker,
            page_bytes=request.page_bytes,
            block_size=request.block_size,
            keys=b"".join(keys[i] for i in wanted),
            left_s=min(request.timeout_s, self._settings.put_timeout_s_max),
            owner=owner,
        )
        is_replica = source is not None and not source.is_draining
        self._add(row, node, request.cost_us, source, is_replica)
        self._journal.start_put(row)
        return PutGrant(wanted=wanted, segment=node.segment)

    async def end(self, request: PutEnd) -> None:
        """Make the put's pages visible, durably. Safe to repeat.

        Raises PutUnknown, StaleEpoch, InvalidRequest before anything is changed; Unavailable if the outcome is open.
        """
        put = self._puts.get(request.put_id)
        if put is None:
            state = await self._state_of(request.put_id)
            if state != _COMMITTED:
                raise PutUnknown("the put was never started, has expired or was revoked")
            return
        if put.state is PutState.VOIDING:
            raise PutUnknown("the put has expired or was revoked")
        self._check_end(put, request)
        if put.state is PutState.PENDING and put.deadline <= self._clock():
            self._void(put)
        if put.state is PutState.PENDING:
            if not self._journal.available:
                raise Unavailable("the metadata database does not answer; try again")
            put.state = PutState.ENDING
            put.extents = pack_extents(extent_array(request.extents))
            put.decided = self._journal.end_put(request.put_id, put.extents)
            put.decided.add_done_callback(lambda decided: self._finish(put, decided))
        self._raise_unless_committed(put, await self._outcome(put))

    async def revoke(self, put_id: bytes) -> None:
        """Void the put. Safe to repeat. Raises PutFinished if its pages are visible, Unavailable if the outcome is open."""
        put = self._puts.get(put_id)
        state: str | None
        if put is None:
            state = await self._state_of(put_id)
        else:
            if put.state is PutState.PENDING:
                self._void(put)
            state = await self._outcome(put)
        if state == _COMMITTED:
            raise PutFinished("the put was finished before it was revoked")

    def expire(self) -> None:
        """Void the puts whose time is over."""
        for put in list(self._puts.values()):
            if put.state is PutState.PENDING and put.deadline <= self._clock():
                _log.info("put_expired", worker=put.row.worker, node=put.node.segment.node, pages=len(put.keys))
                self._void(put)

    def void_node(self, node: Node) -> None:
        """The node's epoch is over, and its undecided puts with it (PostgreSQL voids them with the epoch)."""
        for put in list(self._puts.values()):
            if put.node is node and put.state is PutState.PENDING:
                self._remove(put, "void")

    async def outcomes(self, put_ids: list[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Which of these are committed, and which are void; undecided ones are in neither. Raises Unavailable."""
        settled = {i: self._decided.get(i) for i in put_ids if i not in self._puts}
        unknown = [put_id for put_id, state in settled.items() if state is None]
        if unknown:
            states = await self._store.put_states(unknown)
            settled.update({i: states.get(i, "void") for i in unknown if i not in self._puts})
        committed = [put_id for put_id, state in settled.items() if state == _COMMITTED]
        # A pending row that is not in memory belongs to an epoch that is over.
        return committed, [put_id for put_id, state in settled.items() if state in ("void", "pending")]

    def _wanted(self, request: PutStart, source: Node | None, keys: list[BlockKey]) -> tuple[list[int], int]:
        """Positions of the pages that may be written, and whose they are."""
        pending = self._pending_keys.get(request.namespace, set())
        seen: set[BlockKey] = set()
        wanted = []
        candidates, owner = self._candidates(request, source)
        for i in candidates:
            if keys[i] not in pending and keys[i] not in seen:
                seen.add(keys[i])
                wanted.append(i)
        return wanted, owner

    def _room(self, request: PutStart, source: Node | None, wanted: list[int]) -> tuple[Node | None, list[int]]:
        """Where to, and which of the wanted pages. Raises PoolFull."""
        if source is None:
            node = self._placement.for_put(request.prefer_node, len(wanted), request.page_bytes)
            return node, wanted[: node.free_bytes // request.page_bytes]
        if source.is_draining:
            node = self._placement.for_copies(source, request.page_bytes)
            return node, wanted[: self._placement.room_for_copies(node) // request.page_bytes]
        # Each page once: a daemon may have been ordered to copy one twice.
        keys = b"".join(request.keys[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in wanted)
        target, granted = self._replicas.grant(source, request.namespace, keys, request.page_bytes)
        return target, [wanted[at] for at in granted]

    def _candidates(self, request: PutStart, source: Node | None) -> tuple[list[int], int]:
        index = self._catalog.index
        if not request.copies_from:
            return index.absent(request.namespace, request.keys), request.owner
        if source is None:
            return [], NOBODY
        there, slots = index.lying_in(request.namespace, request.keys, source.index)
        if not len(slots):
            return [], NOBODY
        # A put is one owner's; the pages of others are copied by another one.
        owners = index.owners.of(slots)
        return there[owners == owners[0]].tolist(), int(owners[0])

    def _grant_again(self, put: _Put, request: PutStart) -> PutGrant:
        if put.state is PutState.VOIDING:
            raise PutUnknown("the put has expired or was revoked")
        granted, wanted = set(put.keys), []
        for i, key in enumerate(unpack_keys(request.keys)):
            if key in granted:
                granted.discard(key)
                wanted.append(i)
        if granted or request.namespace != put.row.namespace or request.page_bytes != put.row.page_bytes:
            raise InvalidRequest("this put_id belongs to a put of other pages", param="put_id")
        return PutGrant(wanted=wanted, segment=put.node.segment)

    def _refuse_decided(self, state: str) -> None:
        if state == _COMMITTED:
            raise PutFinished("this put was finished before; start another")
        raise PutUnknown("this put has expired or was revoked; start another")

    def _check_end(self, put: _Put, request: PutEnd) -> None:
        if request.epoch != put.row.epoch:
            raise StaleEpoch("the put was granted on another epoch of the segment")
        if len(request.extents) != len(put.keys):
            raise InvalidRequest(f"the put has {len(put.keys)} pages, not {len(request.extents)}", param="extents")
        last = put.node.segment.size_bytes - put.row.page_bytes
        if not all(0 <= e.offset <= last and 0 <= e.generation < 1 << 63 for e in request.extents):
            raise InvalidRequest("an extent lies outside the segment", param="extents")
        if len({e.offset for e in request.extents}) < len(request.extents):
            raise InvalidRequest("two extents lie at one place", param="extents")
        if put.extents and put.extents != pack_extents(extent_array(request.extents)):
            raise InvalidRequest("the put was ended with other extents before", param="extents")

    def _void(self, put: _Put) -> None:
        put.state = PutState.VOIDING
        put.decided = self._journal.void_put(put.row.put_id)
        put.decided.add_done_callback(lambda decided: self._finish(put, decided))

    async def _outcome(self, put: _Put) -> str:
        """What the write under way decides. Raises Unavailable if that takes too long."""
        assert put.decided is not None
        try:
            return await asyncio.wait_for(asyncio.shield(put.decided), STATEMENT_TIMEOUT_S)
        except TimeoutError:
            raise Unavailable("the metadata database does not answer; ask again") from None

    def _finish(self, put: _Put, decided: Decided) -> None:
        """The write is through, or has failed and left the outcome open."""
        if decided.cancelled() or decided.exception() is not None:
            put.state = PutState.PENDING
            return
        if decided.result() != _COMMITTED:
            self._remove(put, "void")
            return
        if not self._is_current(put):
            self._remove(put, "void")
        else:
            self._remove(put, _COMMITTED)
            extents = unpack_extents(put.extents)
            self._publish(put, extents)
            if put.cost_us > 0:
                self._catalog.index.learn_cost(put.row.namespace, put.cost_us / put.row.page_bytes)

    def _publish(self, put: _Put, extents: ExtentArray) -> None:
        row, source = put.row, put.source
        if source is None:
            self._catalog.insert(put.node, row.namespace, row.keys, extents, row.page_bytes, owner=row.owner)
            return
        if put.is_replica:
            self._catalog.replicate(source, put.node, row.namespace, row.keys, extents, row.page_bytes, row.owner)
            return
        _, slots = self._catalog.index.lying_in(row.namespace, row.keys, source.index)
        for extent in extent_list(self._catalog.index.extents(slots)[0]):
            source.moving.pop(extent, None)
        source.moved_away += len(slots)
        self._catalog.relocate(source, put.node, row.namespace, row.keys, extents, row.page_bytes, row.owner)

    def _raise_unless_committed(self, put: _Put, state: str) -> None:
        if state != _COMMITTED:
            raise PutUnknown("the put has expired or was revoked")
        if not self._is_current(put):
            raise StaleEpoch("the segment's epoch ended before the put did")

    def _is_current(self, put: _Put) -> bool:
        return self._catalog.nodes.at(put.node.index) is put.node

    def _add(
        self, row: StartedPut, node: Node, cost_us: int = 0, source: Node | None = None, is_replica: bool = False
    ) -> None:
        put = _Put(row, node, unpack_keys(row.keys), self._clock() + row.left_s, cost_us, source, is_replica)
        self._puts[row.put_id] = put
        self._pending_keys.setdefault(row.namespace, set()).update(put.keys)
        node.pending_bytes += put.size_bytes

    def _remove(self, put: _Put, state: str) -> None:
        del self._puts[put.row.put_id]
        keys = self._pending_keys[put.row.namespace]
        keys.difference_update(put.keys)
        if not keys:
            del self._pending_keys[put.row.namespace]
        put.node.pending_bytes -= put.size_bytes
        if state != _COMMITTED:
            # The daemon holds the extents until its next report says otherwise.
            put.node.foreign_bytes += put.size_bytes
        self._decided[put.row.put_id] = state
        if len(self._decided) > DECIDED_MAX:
            del self._decided[next(iter(self._decided))]

    async def _state_of(self, put_id: bytes) -> str | None:
        state = self._decided.get(put_id)
        return state if state is not None else (await self._store.put_states([put_id])).get(put_id)
