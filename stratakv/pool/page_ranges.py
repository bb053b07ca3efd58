"""Layers of pages moved as plain ranges, for transports that know nothing of pages; their checksums are computed here."""

from __future__ import annotations

import time
from collections.abc import Iterator

from stratakv._native import Gate, LayerMove, PageHeaders
from stratakv._native.base import UInt64s
from stratakv.layout import layer_checksum
from stratakv.pool.errors import DamagedPage, TransferCancelled, TransportTimeout
from stratakv.pool.headers import require_headers, write_headers
from stratakv.pool.transport import Cancellation, PageBatch, ReadBatch, ReadRange, WriteBatch, WriteRange


def read_by_ranges(
    read_batch: ReadBatch,
    batch: PageBatch,
    checksums: UInt64s,
    *,
    deadline: float,
    done: Gate,
    cancellation: Cancellation | None,
    headers: PageHeaders | None,
) -> None:
    """`Transport.read_pages` by `read_batch`."""
    what = batch.offsets, headers, checksums
    require_headers(read_batch, *what, deadline=deadline, cancellation=cancellation)
    layers = [list(_ranges(batch, layer)) for layer in batch.layers]
    ends = [sum(len(pages) * len(layer.ranges) for pages in layers[: n + 1]) for n, layer in enumerate(batch.layers)]
    verified = 0

    def on_range(filled: int) -> None:
        nonlocal verified
        while verified < len(layers) and ends[verified] <= filled:
            layer = batch.layers[verified].number
            for page, (parts, expected) in enumerate(zip(layers[verified], checksums[verified].tolist(), strict=True)):
                if layer_checksum([part.into for part in parts]) != expected:
                    raise DamagedPage(f"layer {layer} of a page does not match its checksum", index=page, layer=layer)
            verified += 1
            done.open(layer + 1)

    ranges = [part for pages in layers for parts in pages for part in parts]
    read_batch(ranges, deadline=deadline, on_range=on_range, cancellation=cancellation)


def write_by_ranges(
    write_batch: WriteBatch,
    put_id: bytes,
    batch: PageBatch,
    checksums: UInt64s,
    *,
    deadline: float,
    ready: Gate,
    headers: PageHeaders | None,
) -> None:
    """`Transport.write_pages` by `write_batch`."""
    for index, layer in enumerate(batch.layers):
        if not ready.wait(layer.number + 1, deadline):
            if ready.is_closed or time.monotonic() < deadline:
                raise TransferCancelled("the transfer was given up")
            raise TransportTimeout("the deadline passed")
        pages = list(_ranges(batch, layer))
        write_batch(put_id, [WriteRange(*part) for parts in pages for part in parts], deadline=deadline)
        checksums[index] = [layer_checksum([part.into for part in parts]) for parts in pages]
    write_headers(write_batch, put_id, batch.offsets, headers, checksums, deadline=deadline)


def _ranges(batch: PageBatch, layer: LayerMove) -> Iterator[list[ReadRange]]:
    """Per page, its ranges of this layer: where in the segment, and where here."""
    for offset, row in zip(batch.offsets.tolist(), batch.rows.tolist(), strict=True):
        parts, at = [], offset + layer.page_start
        for memory, start, stride, size in layer.ranges:
            begin = start + row * stride
            parts.append(ReadRange(at, memoryview(memory)[begin : begin + size]))
            at += size
        yield parts
