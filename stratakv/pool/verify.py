"""Reads the pages of a node as any reader would and checks them. Called by `stratakv cache verify`.

A header bears checksums of the layers, but not how long each is. Where they are equal, as in every layout with one kind of
layer, a page tells so by itself: most of its layers match. Of a namespace in which no page does, only headers are checked.
What looks damaged is looked at again under a lease, since it may only have been moved or dropped meanwhile.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from stratakv.layout import HEADER_BYTES, CorruptPage, PageHeader, layer_checksum
from stratakv.pool.dmp_client import DmpConnection
from stratakv.pool.errors import OutOfBounds
from stratakv.pool.shards import PoolClient
from stratakv.wire import (
    Done,
    ListPages,
    Match,
    MatchPrefix,
    PageAt,
    Pages,
    Place,
    ReleaseLease,
    ReportCorrupt,
    Segment,
)

BATCH_BYTES = 8 * 1024 * 1024
READ_TIMEOUT_S = 10.0
LEASE_S = 30.0
UNPROVEN_MAX = 1000
"""Pages of one namespace that are looked at again later; if none of so many tells its layout, none will."""


class PageState(enum.Enum):
    """What one page's bytes are."""

    WHOLE = enum.auto()
    DAMAGED = enum.auto()
    UNPROVEN = enum.auto()
    """The header is right, and most layers do not match: damaged, or layers of several sizes."""


@dataclass(slots=True)
class Findings:
    """What was found on one node so far."""

    node: str
    pages: int = 0
    size_bytes: int = 0
    header_only: int = 0
    """Pages whose layers could not be checked."""
    gone: int = 0
    """Pages that were moved or dropped before they were read."""
    damaged: list[PageAt] = field(default_factory=list)


class Verifier:
    """Checks one node's pages at a bounded rate and reports damaged ones to the meta server."""

    def __init__(self, client: PoolClient, segment: Segment, connection: DmpConnection, bytes_per_s: int) -> None:
        self.findings = Findings(segment.node)
        self._client = client
        self._connection = connection
        self._bytes_per_s = bytes_per_s
        self._matched: Counter[bytes] = Counter()
        """Pages by namespace that told their layout."""
        self._unproven: defaultdict[bytes, list[PageAt]] = defaultdict(list)

    async def run(self, on_page: Callable[[Findings], None]) -> Findings:
        """Check every page; `on_page` is called as they are done. Raises TransportError, Unavailable."""
        async for batch in self._batches():
            began = time.monotonic()
            for page, state in zip(batch, await asyncio.to_thread(self._check, batch), strict=True):
                self._count(page, state)
                if state is PageState.DAMAGED:
                    await self._check_again(page)
            on_page(self.findings)
            size_bytes = sum(page.page_bytes for page in batch)
            await asyncio.sleep(max(0.0, began + size_bytes / self._bytes_per_s - time.monotonic()))
        for namespace, pages in self._unproven.items():
            if self._matched[namespace]:
                self.findings.header_only -= len(pages)
                for page in pages:
                    await self._check_again(page)
        return self.findings

    async def _batches(self) -> AsyncIterator[list[PageAt]]:
        after = -1
        while True:
            part = await self._client.call(ListPages(self.findings.node, after), Pages)
            if not part.pages:
                return
            after = part.last
            for batch in _in_batches(part.pages):
                yield batch

    def _count(self, page: PageAt, state: PageState) -> None:
        self.findings.pages += 1
        self.findings.size_bytes += page.page_bytes
        if state is PageState.WHOLE:
            self._matched[page.namespace] += 1
        elif state is PageState.UNPROVEN:
            self.findings.header_only += 1
            if len(self._unproven[page.namespace]) < UNPROVEN_MAX:
                self._unproven[page.namespace].append(page)

    def _check(self, batch: Sequence[PageAt]) -> list[PageState]:
        """Blocks."""
        memory = memoryview(bytearray(sum(page.page_bytes for page in batch)))
        views, at = [], 0
        for page in batch:
            views.append(memory[at : at + page.page_bytes])
            at += page.page_bytes
        ranges = [(page.extent.offset, view) for page, view in zip(batch, views, strict=True)]
        try:
            self._connection.transport.read_batch(ranges, deadline=time.monotonic() + READ_TIMEOUT_S)
        except OutOfBounds:
            # A file of a disk that is gone or cut takes the whole batch along.
            return self._check_each(batch)
        return [check_page(page, view) for page, view in zip(batch, views, strict=True)]

    def _check_each(self, batch: Sequence[PageAt]) -> list[PageState]:
        if len(batch) == 1:
            return [PageState.DAMAGED]
        return [self._check([page])[0] for page in batch]

    async def _check_again(self, page: PageAt) -> None:
        """Under a lease, so that it is certain whose bytes these are."""
        match = await self._client.call(MatchPrefix(page.namespace, page.key, LEASE_S, self.findings.node), Match)
        place = Place(self.findings.node, page.extent.offset, page.extent.generation)
        try:
            if place not in match.places():
                self.findings.gone += 1
            elif (await asyncio.to_thread(self._check, [page]))[0] is not PageState.WHOLE:
                self.findings.damaged.append(page)
                await self._client.call(ReportCorrupt(page.namespace, page.key, place), Done)
        finally:
            if match.lease_id:
                await self._client.call(ReleaseLease(match.lease_id), Done)


def check_page(page: PageAt, data: memoryview) -> PageState:
    """Whether these bytes are the page that the index has, as far as they tell."""
    try:
        header = PageHeader.unpack(data[:HEADER_BYTES])
    except CorruptPage:
        return PageState.DAMAGED
    is_same = (header.namespace, header.key, header.generation) == (page.namespace, page.key, page.extent.generation)
    num_layers = len(header.layer_checksums)
    if not is_same or not num_layers or HEADER_BYTES + header.data_bytes > len(data):
        return PageState.DAMAGED
    if header.data_bytes % num_layers:
        return PageState.UNPROVEN
    size = header.data_bytes // num_layers
    layers = (data[HEADER_BYTES + n * size : HEADER_BYTES + (n + 1) * size] for n in range(num_layers))
    num_matching = sum(
        layer_checksum([layer]) == expected for layer, expected in zip(layers, header.layer_checksums, strict=True)
    )
    if num_matching == num_layers:
        return PageState.WHOLE
    return PageState.DAMAGED if 2 * num_matching > num_layers else PageState.UNPROVEN


def _in_batches(pages: Sequence[PageAt]) -> Iterator[list[PageAt]]:
    batch: list[PageAt] = []
    size_bytes = 0
    for page in pages:
        if batch and size_bytes + page.page_bytes > BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
        batch.append(page)
        size_bytes += page.page_bytes
    if batch:
        yield batch
