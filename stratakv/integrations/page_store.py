"""Whole pages put into the pool and loaded from it, by the thread that asks: for engines that move a batch at a time.

    store = PageStore(link, layout, namespace, name="sglang-0", node=link.local_node)
    stored = store.put(keys, memory)            [True, True, False]
    loaded = store.load(keys, memory)           what is False holds anything

Thread-safe. Calls raise StrataError when the meta server or the daemon that was chosen fails; single pages that cannot be found,
loaded or stored are only False.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass

from stratakv.errors import StrataError, Unavailable
from stratakv.integrations.link import PoolLink
from stratakv.keys import BlockKey, Namespace, pack_keys
from stratakv.layout import KVLayout
from stratakv.log import EventLogger
from stratakv.pool.dmp_client import DmpConnection
from stratakv.pool.errors import PageError, TransportError
from stratakv.pool.meta_errors import PoolFull
from stratakv.pool.open_put import CONNECT_S_MAX, open_put
from stratakv.pool.pages import PageMemory, PageReader, PageWriter, ReadPages
from stratakv.wire import (
    PUT_ID_BYTES,
    Done,
    Extent,
    FindBlocks,
    FoundBlocks,
    Match,
    MatchPrefix,
    Message,
    Place,
    PutEnd,
    PutGrant,
    PutRevoke,
    PutStart,
    ReleaseLease,
    ReplyT,
    ReportCorrupt,
    Segment,
)

log = EventLogger("stratakv.integrations.page_store")

REPLY_S_MAX = 5.0
PUTS_MAX = 8
"""Segments that one batch is spread over, when none has room for all of it."""
DAMAGED_MAX = 8
"""Damaged pages a read of one daemon may meet; then the rest of it is given up."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long calls may take."""

    lookup_s: float = 0.5
    load_s: float = 5.0
    put_s: float = 30.0


@dataclass(frozen=True, slots=True)
class OpenedPages:
    """Pages whose headers were read."""

    parts: Sequence[tuple[ReadPages, Sequence[int]]]
    """Per daemon: its pages, and which of all they are."""
    deadline: float
    report: Callable[[int], None]

    def read(self, layer: int, memory: PageMemory) -> None:
        """Copy one layer of every page, and verify it. Raises StrataError."""
        for pages, indices in self.parts:
            try:
                rows = memory.rows[list(indices)]
                pages.read_layers([layer], PageMemory(memory.layers, rows), deadline=self.deadline)
            except PageError as error:
                self.report(indices[error.index])
                raise Unavailable(f"a page is damaged: {error}") from error


class PageStore:
    """Pages of one layout and namespace."""

    def __init__(
        self,
        link: PoolLink,
        layout: KVLayout,
        namespace: Namespace,
        *,
        name: str,
        node: Callable[[], str | None],
        patience: Patience | None = None,
    ) -> None:
        """`node` names the daemon that pages are put to if it has room."""
        self.layout = layout
        self.namespace = namespace
        self._link = link
        self._name = name
        self._node = node
        self._patience = patience or Patience()
        self._reader = PageReader(layout, namespace)
        self._writer = PageWriter(layout, namespace)
        self._layers = range(len(layout.layers))

    def count(self, keys: Sequence[BlockKey]) -> int:
        """How many leading pages the pool has. Raises StrataError."""
        return self._match(keys, lease_s=0.0).num_blocks if keys else 0

    def present(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which pages the pool has, each by itself. Raises StrataError."""
        if not keys:
            return []
        request = FindBlocks(self.namespace, pack_keys(keys))
        found = self._ask(request, FoundBlocks, self._patience.lookup_s)
        missing = set(found.missing)
        return [index not in missing for index in range(len(keys))]

    def load(self, keys: Sequence[BlockKey], memory: PageMemory) -> list[bool]:
        """Copy the leading pages that the pool has, and verify them; which are whole. Raises StrataError."""
        loaded = [False] * len(keys)
        deadline = time.monotonic() + self._patience.load_s
        match = self._match(keys, lease_s=self._patience.load_s)
        places = match.places()
        segments = {segment.node: segment for segment in match.segments}
        try:
            for node, indices in _by_node(places).items():
                for index in self._load_from(segments[node], indices, places, keys, memory, deadline):
                    loaded[index] = True
        finally:
            if match.lease_id:
                self._link.tell(ReleaseLease(match.lease_id))
        return loaded

    @contextmanager
    def opened(self, keys: Sequence[BlockKey], timeout_s: float) -> Iterator[OpenedPages]:
        """Pages to be read layer by layer, all of them, within that time. Raises StrataError if one is missing or bad."""
        deadline = time.monotonic() + timeout_s
        match = self._match(keys, lease_s=timeout_s)
        try:
            if match.num_blocks < len(keys):
                raise Unavailable(f"{len(keys) - match.num_blocks} of {len(keys)} pages are not in the pool any more")
            yield self._opened(keys, match, deadline)
        finally:
            if match.lease_id:
                self._link.tell(ReleaseLease(match.lease_id))

    def put(self, keys: Sequence[BlockKey], memory: PageMemory) -> list[bool]:
        """Store the pages that the pool has not; which of them it has now, or is being given by others. Raises StrataError."""
        stored = [False] * len(keys)
        start = 0
        for _ in range(PUTS_MAX):
            if start == len(keys):
                break
            try:
                stop = start + self._put_some(keys[start:], memory.part(start, len(keys)))
            except PoolFull:
                break
            stored[start:stop] = [True] * (stop - start)
            start = stop
        return stored

    def _match(self, keys: Sequence[BlockKey], lease_s: float) -> Match:
        node = (self._node() if lease_s else None) or ""
        return self._ask(MatchPrefix(self.namespace, pack_keys(keys), lease_s, node), Match, self._patience.lookup_s)

    def _ask(self, request: Message, reply_type: type[ReplyT], timeout_s: float = REPLY_S_MAX) -> ReplyT:
        try:
            return self._link.call(request, reply_type, timeout_s).result(REPLY_S_MAX)
        except (TimeoutError, CancelledError) as error:
            raise Unavailable("the connection to the pool is closed") from error

    def _opened(self, keys: Sequence[BlockKey], match: Match, deadline: float) -> OpenedPages:
        places = match.places()
        segments = {segment.node: segment for segment in match.segments}
        parts = []
        for node, indices in _by_node(places).items():
            connect_by = min(deadline, time.monotonic() + CONNECT_S_MAX)
            connection = self._link.connections.get(segments[node], deadline=connect_by)
            pages = self._reader.read_headers(
                connection, [places[index] for index in indices], [keys[index] for index in indices], deadline=deadline
            )
            if pages.failures:
                bad = min(pages.failures)
                self._report(keys[indices[bad]], places[indices[bad]])
                raise Unavailable(f"a page is damaged: {pages.failures[bad]}")
            parts.append((pages, indices))
        return OpenedPages(parts, deadline, lambda index: self._report(keys[index], places[index]))

    def _load_from(
        self,
        segment: Segment,
        indices: Sequence[int],
        places: Sequence[Place],
        keys: Sequence[BlockKey],
        memory: PageMemory,
        deadline: float,
    ) -> Iterable[int]:
        """Load pages that lie on one daemon; the indices of those that are whole. A daemon that fails has none."""
        connections = self._link.connections
        connection: DmpConnection | None = None
        try:
            connection = connections.get(segment, deadline=min(deadline, time.monotonic() + CONNECT_S_MAX))
            wanted = [keys[index] for index in indices]
            pages = self._reader.read_headers(
                connection, [places[index] for index in indices], wanted, deadline=deadline
            )
            for failed in pages.failures:
                self._report(keys[indices[failed]], places[indices[failed]])
            return self._read(pages, indices, places, keys, memory, deadline)
        except StrataError as error:
            if connection is not None and isinstance(error, TransportError):
                connections.drop(connection, error.message)
            log.info("load_failed", node=segment.node, pages=len(indices), error=error.message)
            return ()

    def _read(
        self,
        pages: ReadPages,
        indices: Sequence[int],
        places: Sequence[Place],
        keys: Sequence[BlockKey],
        memory: PageMemory,
        deadline: float,
    ) -> Sequence[int]:
        """Read what has good headers, again without each page that turns out damaged."""
        good = [position for position in range(len(pages)) if position not in pages.failures]
        for _ in range(DAMAGED_MAX):
            if not good:
                break
            rows = memory.rows[[indices[position] for position in good]]
            try:
                pages.take(good).read_layers(self._layers, PageMemory(memory.layers, rows), deadline=deadline)
                return [indices[position] for position in good]
            except PageError as error:
                damaged = indices[good.pop(error.index)]
                self._report(keys[damaged], places[damaged])
        return ()

    def _report(self, key: BlockKey, place: Place) -> None:
        log.warning("bad_page", node=place.node, offset=place.offset)
        self._link.tell(ReportCorrupt(self.namespace, key, place))

    def _put_some(self, keys: Sequence[BlockKey], memory: PageMemory) -> int:
        """Store leading pages, as many as one segment takes; how many the pool has then. Raises StrataError."""
        put_id = os.urandom(PUT_ID_BYTES)
        request = PutStart(
            put_id=put_id,
            namespace=self.namespace,
            keys=pack_keys(keys),
            page_bytes=self.layout.page_bytes,
            block_size=self.layout.page_tokens,
            prefer_node=self._node(),
            worker=self._name,
            timeout_s=self._patience.put_s,
        )
        grant = self._ask(request, PutGrant)
        if grant.segment is None or not grant.wanted:
            return len(keys)
        try:
            extents = self._write(put_id, grant.segment, grant, keys, memory)
            self._ask(PutEnd(put_id, grant.segment.epoch, list(extents)), Done)
        except Exception:
            self._link.tell(PutRevoke(put_id))
            raise
        return grant.wanted[-1] + 1

    def _write(
        self, put_id: bytes, segment: Segment, grant: PutGrant, keys: Sequence[BlockKey], memory: PageMemory
    ) -> Sequence[Extent]:
        deadline = time.monotonic() + self._patience.put_s
        wanted = [keys[index] for index in grant.wanted]
        with open_put(self._link.connections, segment, put_id, deadline=deadline) as connection:
            extents = connection.allocate(
                put_id, len(wanted), self.layout.page_bytes, self._patience.put_s, deadline=deadline, term=grant.term
            )
            pages = self._writer.begin(connection, put_id, extents, wanted)
            pages.write(PageMemory(memory.layers, memory.rows[grant.wanted]), deadline=deadline)
        return extents


def _by_node(places: Sequence[Place]) -> dict[str, list[int]]:
    """Indices of the places on each node."""
    found: dict[str, list[int]] = {}
    for index, place in enumerate(places):
        found.setdefault(place.node, []).append(index)
    return found
