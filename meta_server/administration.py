"""What operators ask of the cache: what lies where, drop it, rule it, pin it. One method per message; called by the dispatch."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from meta_server.catalog import Catalog
from meta_server.journal import Journal, confirmed
from meta_server.leases import LeaseTable
from meta_server.records import extent_list
from meta_server.rules import Rules
from meta_server.validate import check_keys, check_rule
from meta_server.workers import WorkerTable
from stratakv import wire
from stratakv.errors import InvalidRequest

PIN_S_MAX = 30 * 24 * 3600.0
PAGES_LISTED_MAX = 16_384
"""In one reply."""


class Administration:
    """Reads and changes the catalog at an operator's word."""

    def __init__(
        self, catalog: Catalog, journal: Journal, workers: WorkerTable, pins: LeaseTable, rules: Rules
    ) -> None:
        self._catalog = catalog
        self._index = catalog.index
        self._journal = journal
        self._workers = workers
        self._pins = pins
        self._rules = rules
        self.by_message: dict[type[wire.Message], Callable[[Any], wire.Message | Awaitable[wire.Message]]] = {
            wire.Flush: self.flush,
            wire.SetCacheRule: self.set_cache_rule,
            wire.ListNamespaces: self.list_namespaces,
            wire.ListPages: self.list_pages,
            wire.PinPrefix: self.pin_prefix,
            wire.Unpin: self.unpin,
            wire.SetNodeLimit: self.set_node_limit,
        }

    async def flush(self, request: wire.Flush) -> wire.Flushed:
        if request.namespace:
            check_keys(request.namespace, b"")
        slots = [self._index.unpinned(node.index, request.namespace) for node in self._catalog.nodes]
        before = self._index.num_blocks
        if slots:
            self._catalog.remove(np.concatenate(slots), "flushed")
        num_blocks = before - self._index.num_blocks
        await confirmed(self._journal.all_written())
        return wire.Flushed(num_blocks=num_blocks)

    async def set_cache_rule(self, request: wire.SetCacheRule) -> wire.Done:
        check_rule(request.rule)
        self._rules.set(request.rule)
        await confirmed(self._journal.all_written())
        return wire.Done()

    def list_namespaces(self, _: wire.ListNamespaces) -> wire.Namespaces:
        names = {node.index: node.segment.node for node in self._catalog.nodes}
        usage = self._index.usage()
        by_namespace: dict[bytes, list[wire.WorkerInfo]] = {}
        for worker in self._workers.states():
            by_namespace.setdefault(worker.info.namespace, []).append(worker.info)
        found = []
        for namespace in sorted({*usage, *by_namespace, *self._rules.namespaces()}):
            segments, workers = usage.get(namespace, {}), by_namespace.get(namespace, [])
            found.append(
                wire.NamespaceState(
                    namespace,
                    sorted({info.model for info in workers}),
                    workers[0].block_size if workers else 0,
                    self._index.count(namespace),
                    {names[segment]: size for segment, (_, size) in segments.items()},
                    self._rules.get(namespace),
                    {names[segment]: blocks for segment, (blocks, _) in segments.items()},
                )
            )
        return wire.Namespaces(found)

    def list_pages(self, request: wire.ListPages) -> wire.Pages:
        node = self._catalog.nodes.get(request.node)
        if node is None:
            raise InvalidRequest(f"no node {request.node!r} is in the pool", param="node")
        slots = self._index.in_segment(node.index)
        slots = slots[slots > request.after][:PAGES_LISTED_MAX]
        extents, sizes = self._index.extents(slots)
        pages = [
            wire.PageAt(namespace, key, extent, size)
            for (namespace, key), extent, size in zip(
                self._index.identify(slots), extent_list(extents), sizes.tolist(), strict=True
            )
        ]
        return wire.Pages(pages, int(slots[-1]) if len(slots) else request.after)

    def pin_prefix(self, request: wire.PinPrefix) -> wire.Pinned:
        check_keys(request.namespace, request.keys)
        slots = self._index.match(request.namespace, request.keys)
        return wire.Pinned(len(slots), self._pins.grant(slots, request.pin_s) if len(slots) else 0)

    def unpin(self, request: wire.Unpin) -> wire.Done:
        self._catalog.unpinned(self._pins.release(request.pin_id))
        return wire.Done()

    def set_node_limit(self, request: wire.SetNodeLimit) -> wire.Done:
        node = self._catalog.nodes.get(request.node)
        if node is None or node.segment.is_disk:
            raise InvalidRequest(f"no daemon {request.node!r} is in the pool", param="node")
        if not 0 <= request.limit_bytes <= node.segment.size_bytes:
            raise InvalidRequest(
                f"the segment of {request.node} has {node.segment.size_bytes} bytes; it cannot have more before a restart",
                param="limit_bytes",
            )
        node.limit_bytes = request.limit_bytes
        return wire.Done()
