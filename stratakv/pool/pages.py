"""Pages of one layout and namespace, moved layer by layer between a daemon's segment and buffers of the caller.

Writing:   pages = writer.begin(connection, put_id, extents, keys)
           for each layer: pages.write_layer(layer, sources, deadline=…)
           pages.write_headers(deadline=…)                       the header comes last and carries each layer's checksum
Reading:   pages = reader.read_headers(connection, places, keys, deadline=…)
           pages.read_layer(layer, destinations, deadline=…)     or read_layers, which keeps the wire busy across layers

`sources` and `destinations` hold, per page, one buffer per range of the layer (for attention: k, v): contiguous, one
dimension, format B. A page that is not exactly what the index says is an error of that page, never bytes: what lies in the
destination buffers counts only once the call that filled them has returned, or has said so through `on_layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from stratakv.keys import BlockKey, Namespace
from stratakv.layout import CorruptPage, KVLayout, PageHeader, layer_checksum, packed_header_bytes
from stratakv.pool.dmp_client import DmpConnection
from stratakv.pool.errors import DamagedPage, PageError, StalePage
from stratakv.pool.transport import Buffer, Cancellation
from stratakv.wire import Extent, Place

BufferT = TypeVar("BufferT", bound=Buffer)
PageViews = Sequence[Sequence[memoryview]]
"""[page][range] → where that range of one layer goes."""
PageSources = Sequence[Sequence[Buffer]]
"""[page][range] → that range's bytes of one layer."""


class _Geometry:
    """Where everything lies in a page, as the batches below need it."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.num_layers = len(layout.layers)
        self.header_bytes = packed_header_bytes(self.num_layers)
        self.range_sizes = [[spec.size_bytes for spec in layer.ranges] for layer in layout.layers]
        self._range_offsets = [
            start + np.cumsum([0, *sizes[:-1]], dtype=np.int64)
            for start, sizes in zip(layout.layer_offsets(), self.range_sizes, strict=True)
        ]

    def ranges(
        self, layer: int, page_offsets: npt.NDArray[np.int64], pages: Sequence[Sequence[BufferT]]
    ) -> list[tuple[int, BufferT]]:
        """Segment offset and buffer of every range of one layer, page by page. Raises ValueError for wrong sizes."""
        sizes = self.range_sizes[layer]
        buffers = list(chain.from_iterable(pages))
        if list(map(len, buffers)) != sizes * len(page_offsets):
            raise ValueError(f"layer {layer} takes {len(page_offsets)} pages of ranges of {sizes} bytes")
        offsets = (page_offsets[:, None] + self._range_offsets[layer]).ravel().tolist()
        return list(zip(offsets, buffers, strict=True))


@dataclass(frozen=True, slots=True)
class ReadPages:
    """Pages of one daemon whose headers were read. Layers can be read only while `failures` is empty: see `take`."""

    connection: DmpConnection
    headers: tuple[PageHeader | None, ...]
    failures: dict[int, PageError]
    """Index → why that page is no such page; its header is None."""
    _offsets: npt.NDArray[np.int64]
    _geometry: _Geometry

    def __len__(self) -> int:
        return len(self.headers)

    def take(self, indices: Sequence[int]) -> ReadPages:
        """Some of the pages, in the given order, as a batch of their own; none of them may have failed."""
        return ReadPages(
            self.connection,
            tuple(self.headers[index] for index in indices),
            {at: self.failures[index] for at, index in enumerate(indices) if index in self.failures},
            self._offsets[list(indices)],
            self._geometry,
        )

    def read_layer(
        self, layer: int, destinations: PageViews, *, deadline: float, cancellation: Cancellation | None = None
    ) -> None:
        """Copy one layer of every page and verify it. Raises DamagedPage, TransportError, TransferCancelled."""
        self.read_layers([layer], [destinations], deadline=deadline, cancellation=cancellation)

    def read_layers(
        self,
        layers: Sequence[int],
        destinations: Sequence[PageViews],
        *,
        deadline: float,
        on_layer: Callable[[int], None] | None = None,
        cancellation: Cancellation | None = None,
    ) -> None:
        """Several layers in one transfer, in order; `on_layer(layer)` when that layer of every page is there and verified.

        `destinations[i]` belongs to `layers[i]`. Raises DamagedPage, TransportError, TransferCancelled.
        """
        ranges, ends = self._ranges(layers, destinations)
        verified = 0

        def on_range(filled: int) -> None:
            nonlocal verified
            while verified < len(layers) and ends[verified] <= filled:
                self._verify(layers[verified], destinations[verified])
                if on_layer is not None:
                    on_layer(layers[verified])
                verified += 1

        self.connection.transport.read_batch(ranges, deadline=deadline, on_range=on_range, cancellation=cancellation)

    def _ranges(
        self, layers: Sequence[int], destinations: Sequence[PageViews]
    ) -> tuple[list[tuple[int, memoryview]], list[int]]:
        """All ranges in layer order, and how many there are up to the end of each layer."""
        if self.failures:
            raise ValueError("pages that failed cannot be read; take the others")
        ranges: list[tuple[int, memoryview]] = []
        ends: list[int] = []
        for layer, pages in zip(layers, destinations, strict=True):
            ranges += self._geometry.ranges(layer, self._offsets, pages)
            ends.append(len(ranges))
        return ranges, ends

    def _verify(self, layer: int, destinations: PageViews) -> None:
        for index, (header, parts) in enumerate(zip(self.headers, destinations, strict=True)):
            assert header is not None
            if layer_checksum(parts) != header.layer_checksums[layer]:
                raise DamagedPage(f"layer {layer} of a page does not match its checksum", index=index, layer=layer)


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
        size = self._geometry.header_bytes
        raw = memoryview(bytearray(size * len(places)))
        views = [raw[at : at + size] for at in range(0, len(raw), size)]
        ranges = list(zip([place.offset for place in places], views, strict=True))
        connection.transport.read_batch(ranges, deadline=deadline, cancellation=cancellation)
        headers: list[PageHeader | None] = []
        failures: dict[int, PageError] = {}
        for index, (place, key, view) in enumerate(zip(places, keys, views, strict=True)):
            try:
                headers.append(self._header(index, place, key, view))
            except PageError as error:
                failures[index] = error
                headers.append(None)
        offsets = np.array([place.offset for place in places], dtype=np.int64)
        return ReadPages(connection, tuple(headers), failures, offsets, self._geometry)

    def _header(self, index: int, place: Place, key: BlockKey, raw: memoryview) -> PageHeader:
        try:
            header = PageHeader.unpack(raw)
        except CorruptPage as error:
            raise DamagedPage(str(error), index=index) from error
        layout = self._geometry.layout
        if header.namespace != self._namespace or header.key != key or header.generation != place.generation:
            raise StalePage("another page lies at this place", index=index)
        if header.data_bytes != layout.data_bytes or len(header.layer_checksums) != self._geometry.num_layers:
            raise StalePage("the page has another layout", index=index)
        return header


@dataclass(slots=True)
class WritePages:
    """Pages of one put that are being written."""

    connection: DmpConnection
    put_id: bytes
    extents: Sequence[Extent]
    keys: Sequence[BlockKey]
    _geometry: _Geometry
    _namespace: Namespace
    _offsets: npt.NDArray[np.int64]
    _checksums: dict[int, list[int]] = field(default_factory=dict)
    """Layer → checksum of each page."""

    def write_layer(
        self, layer: int, sources: PageSources, *, deadline: float, cancellation: Cancellation | None = None
    ) -> None:
        """Write one layer of every page, in any order of layers. Raises TransportError, PutRefused, TransferCancelled.

        The sources must not change before it returns; what did would be found damaged by every reader.
        """
        ranges = self._geometry.ranges(layer, self._offsets, sources)
        checksums = [layer_checksum(parts) for parts in sources]
        transport = self.connection.transport
        transport.write_batch(self.put_id, ranges, deadline=deadline, cancellation=cancellation)
        self._checksums[layer] = checksums

    def write_headers(self, *, deadline: float) -> None:
        """Write all headers, once every layer is written. Raises TransportError, PutRefused."""
        num_layers = self._geometry.num_layers
        if len(self._checksums) != num_layers:
            raise ValueError(f"{num_layers - len(self._checksums)} layers have not been written")
        data_bytes = self._geometry.layout.data_bytes
        by_page = zip(*(self._checksums[layer] for layer in range(num_layers)), strict=True)
        ranges = [
            (extent.offset, PageHeader(self._namespace, key, extent.generation, data_bytes, checksums).pack())
            for extent, key, checksums in zip(self.extents, self.keys, by_page, strict=True)
        ]
        self.connection.transport.write_batch(self.put_id, ranges, deadline=deadline)


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
        return WritePages(connection, put_id, extents, keys, self._geometry, self._namespace, offsets)
