"""Pages of one layout and namespace, moved layer by layer between a daemon's segment and memory of the caller.

Writing:   pages = writer.begin(connection, put_id, extents, keys)
           pages.write(memory, ready=gate, deadline=…)                     each layer as soon as the gate lets it pass
           or step by step: pages.write_layers(layers, …), and pages.write_headers(…), with each layer's checksum, last
Reading:   reader.read(connection, places, keys, memory, done=gate, deadline=…)        the gate opens behind each layer
           or step by step: pages = reader.read_headers(…), and pages.read_layers(layers, …)
In between: pages = reader.without_headers(connection, extents)            of a put that is not finished
           pages.expect(layers, checksums); pages.read_layers(layers, …)   as its writer tells them

A page that is not exactly what the index says is an error of that page, never bytes: what lies in the caller's memory counts
only once the call that filled it has returned, or the gate has opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from stratakv._native import Gate, LayerMove, PageHeaders, RangeMove, make_gate
from stratakv._native.base import Int64s, UInt64s
from stratakv.keys import BlockKey, Namespace
from stratakv.layout import KVLayout
from stratakv.pool.dmp_client import DmpConnection
from stratakv.pool.errors import PageError
from stratakv.pool.headers import read_headers, write_headers
from stratakv.pool.transport import Buffer, Cancellation, PageBatch
from stratakv.wire import Extent, Place


class RangeMemory(NamedTuple):
    """Where one range of a layer lies for every page: that in row n begins at `start + n * stride`. Contiguous, format B."""

    memory: Buffer
    start: int
    stride: int


@dataclass(frozen=True, slots=True)
class PageMemory:
    """The caller's memory of some pages: `layers[layer][range]`, and the row of each page."""

    layers: Sequence[Sequence[RangeMemory]]
    rows: Int64s

    def part(self, start: int, stop: int) -> PageMemory:
        """That of pages `start` .. `stop - 1`."""
        return PageMemory(self.layers, self.rows[start:stop])


class _Geometry:
    """Where everything lies in a page, as the batches below need it."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.num_layers = len(layout.layers)
        self._range_sizes = [[spec.size_bytes for spec in layer.ranges] for layer in layout.layers]
        self._layer_offsets = layout.layer_offsets()

    def batch(self, offsets: Int64s, layers: Sequence[int], memory: PageMemory) -> PageBatch:
        """Raises ValueError unless the memory has a row for every page and all the layout's ranges."""
        if len(memory.rows) != len(offsets):
            raise ValueError(f"{len(offsets)} pages need as many rows, not {len(memory.rows)}")
        return PageBatch(offsets, [self._layer(layer, memory.layers[layer]) for layer in layers], memory.rows)

    def headers(self, namespace: Namespace, keys: Sequence[BlockKey], generations: Sequence[int]) -> PageHeaders:
        """Those of pages of this layout."""
        ages = np.array(generations, dtype=np.uint64)
        return PageHeaders(namespace, b"".join(keys), ages, self.layout.data_bytes, self.num_layers)

    def _layer(self, layer: int, ranges: Sequence[RangeMemory]) -> LayerMove:
        sizes = zip(ranges, self._range_sizes[layer], strict=True)
        return LayerMove(layer, self._layer_offsets[layer], tuple(RangeMove(*memory, size) for memory, size in sizes))


@dataclass(frozen=True, slots=True)
class ReadPages:
    """Pages of one daemon whose headers were read. Layers can be read only while `failures` is empty: see `take`."""

    connection: DmpConnection
    failures: dict[int, PageError]
    """Index → why that page is no such page."""
    _offsets: Int64s
    _checksums: UInt64s
    """[layer][page]; of pages that did not fail."""
    _geometry: _Geometry

    def __len__(self) -> int:
        return len(self._offsets)

    def take(self, indices: Sequence[int]) -> ReadPages:
        """Some of the pages, in the given order, as a batch of their own."""
        return ReadPages(
            self.connection,
            {at: self.failures[index] for at, index in enumerate(indices) if index in self.failures},
            self._offsets[list(indices)],
            self._checksums[:, list(indices)],
            self._geometry,
        )

    def expect(self, layers: Sequence[int], packed: bytes) -> None:
        """Take what the writer of these pages says of layers: `WritePages.checksums` of the same ones. Raises ValueError."""
        numbers = np.frombuffer(packed, dtype="<u8")
        self._checksums[list(layers)] = numbers.reshape(len(layers), len(self))

    def read_layers(
        self,
        layers: Sequence[int],
        memory: PageMemory,
        *,
        deadline: float,
        done: Gate | None = None,
        cancellation: Cancellation | None = None,
    ) -> None:
        """Copy layers of every page in one transfer, in order, and verify them; `done` opens behind each.

        Raises DamagedPage, TransportError, TransferCancelled.
        """
        if self.failures:
            raise ValueError("pages that failed cannot be read; take the others")
        batch = self._geometry.batch(self._offsets, layers, memory)
        checksums = np.ascontiguousarray(self._checksums[list(layers)])
        transport = self.connection.transport
        transport.read_pages(batch, checksums, deadline=deadline, done=done or make_gate(), cancellation=cancellation)


class PageReader:
    """Reads pages of one layout and namespace."""

    def __init__(self, layout: KVLayout, namespace: Namespace) -> None:
        self._geometry = _Geometry(layout)
        self._namespace = namespace

    def read_headers(
        self,
        connection: DmpConnection,
        places: Sequence[Place],
        keys: Sequence[BlockKey],
        *,
        deadline: float,
        cancellation: Cancellation | None = None,
    ) -> ReadPages:
        """Headers of pages on this connection's daemon, `keys[i]` expected at `places[i]`.

        A bad page is told in `failures`; raises TransportError when the daemon fails.
        """
        pages, headers = self._pages(connection, places, keys)
        failures = read_headers(
            connection.transport.read_batch,
            pages._offsets,
            headers,
            pages._checksums,
            deadline=deadline,
            cancellation=cancellation,
        )
        pages.failures.update(failures)
        return pages

    def read(
        self,
        connection: DmpConnection,
        places: Sequence[Place],
        keys: Sequence[BlockKey],
        memory: PageMemory,
        *,
        deadline: float,
        done: Gate | None = None,
        cancellation: Cancellation | None = None,
    ) -> ReadPages:
        """Headers and all layers of pages, in one exchange where the transport can; `done` opens behind each layer.

        Raises PageError for a page that is not the one expected (layers that `done` let through are good all the same),
        TransportError, TransferCancelled.
        """
        pages, headers = self._pages(connection, places, keys)
        batch = self._geometry.batch(pages._offsets, range(self._geometry.num_layers), memory)
        connection.transport.read_pages(
            batch,
            pages._checksums,
            deadline=deadline,
            done=done or make_gate(),
            cancellation=cancellation,
            headers=headers,
        )
        return pages

    def _pages(
        self, connection: DmpConnection, places: Sequence[Place], keys: Sequence[BlockKey]
    ) -> tuple[ReadPages, PageHeaders]:
        """Pages whose headers are still to be read, and what these should say."""
        if len(places) != len(keys):
            raise ValueError("as many keys as places are needed")
        geometry = self._geometry
        offsets = np.array([place.offset for place in places], dtype=np.int64)
        checksums = np.zeros((geometry.num_layers, len(places)), dtype=np.uint64)
        headers = geometry.headers(self._namespace, keys, [place.generation for place in places])
        return ReadPages(connection, {}, offsets, checksums, geometry), headers

    def without_headers(self, connection: DmpConnection, extents: Sequence[Extent]) -> ReadPages:
        """Pages that are still being written: `expect` a layer before it is read."""
        offsets = np.array([extent.offset for extent in extents], dtype=np.int64)
        checksums = np.zeros((self._geometry.num_layers, len(extents)), dtype=np.uint64)
        return ReadPages(connection, {}, offsets, checksums, self._geometry)


@dataclass(slots=True)
class WritePages:
    """Pages of one put that are being written."""

    connection: DmpConnection
    put_id: bytes
    extents: Sequence[Extent]
    keys: Sequence[BlockKey]
    _geometry: _Geometry
    _namespace: Namespace
    _offsets: Int64s
    _checksums: UInt64s
    """[layer][page]"""
    _written: set[int] = field(default_factory=set)

    def write_layers(
        self, layers: Sequence[int], memory: PageMemory, *, deadline: float, ready: Gate | None = None
    ) -> None:
        """Write layers of every page, in any order, each as soon as `ready` lets it pass (without one: at once).

        A layer must not change from there until this returns; what did would be found damaged by every reader. Raises
        TransferCancelled when `ready` is closed, TransportError, PutRefused.
        """
        ready = ready or self._open_gate()
        batch = self._geometry.batch(self._offsets, layers, memory)
        checksums = np.zeros((len(layers), len(self._offsets)), dtype=np.uint64)
        self.connection.transport.write_pages(self.put_id, batch, checksums, deadline=deadline, ready=ready)
        self._checksums[list(layers)] = checksums
        self._written.update(layers)

    def checksums(self, layers: Sequence[int]) -> bytes:
        """Of layers that were written, [layer][page], 8 bytes each, little-endian."""
        return self._checksums[list(layers)].astype("<u8").tobytes()

    def write_headers(self, *, deadline: float) -> None:
        """Write all headers, once every layer is written. Raises TransportError, PutRefused."""
        geometry = self._geometry
        if len(self._written) != geometry.num_layers:
            raise ValueError(f"{geometry.num_layers - len(self._written)} layers have not been written")
        transport = self.connection.transport
        write_headers(
            transport.write_batch, self.put_id, self._offsets, self._headers(), self._checksums, deadline=deadline
        )

    def write(self, memory: PageMemory, *, deadline: float, ready: Gate | None = None) -> None:
        """Write all layers as `write_layers` does, and the headers behind them, in one exchange where the transport can."""
        batch = self._geometry.batch(self._offsets, range(self._geometry.num_layers), memory)
        self.connection.transport.write_pages(
            self.put_id,
            batch,
            self._checksums,
            deadline=deadline,
            ready=ready or self._open_gate(),
            headers=self._headers(),
        )

    def _open_gate(self) -> Gate:
        gate = make_gate()
        gate.open(self._geometry.num_layers)
        return gate

    def _headers(self) -> PageHeaders:
        return self._geometry.headers(self._namespace, self.keys, [extent.generation for extent in self.extents])


class PageWriter:
    """Writes pages of one layout and namespace."""

    def __init__(self, layout: KVLayout, namespace: Namespace) -> None:
        self._geometry = _Geometry(layout)
        self._namespace = namespace

    def begin(
        self, connection: DmpConnection, put_id: bytes, extents: Sequence[Extent], keys: Sequence[BlockKey]
    ) -> WritePages:
        """Start writing `keys[i]` into `extents[i]`, which the daemon granted for the put."""
        if len(extents) != len(keys):
            raise ValueError("as many keys as extents are needed")
        offsets = np.array([extent.offset for extent in extents], dtype=np.int64)
        checksums = np.zeros((self._geometry.num_layers, len(extents)), dtype=np.uint64)
        return WritePages(connection, put_id, extents, keys, self._geometry, self._namespace, offsets, checksums)
