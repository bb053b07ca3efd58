"""The pool's own blocks as the KVCM API shows them: an instance per namespace, keys of 64 bits, places as `dmp://` URIs.

Read only. A key is the low 64 bits, signed, of the pool's own; the page's header has the whole one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np

from meta_server.index import BlockIndex
from meta_server.nodes import Node, NodeTable
from meta_server.workers import WorkerTable
from stratakv.keys import NAMESPACE_BYTES
from stratakv.wire import WorkerInfo

INSTANCE_PREFIX = "stratakv-"


@dataclass(frozen=True, slots=True)
class OwnBlock:
    """A page of the pool."""

    uri: str


@dataclass(frozen=True, slots=True)
class HostMatch:
    """What a worker finds of a prompt's prefix, in blocks."""

    host: str
    """`host:port` of the worker."""
    local: int
    """Leading blocks at its own daemon."""
    fetched: int
    """Of the blocks below, those at other daemons."""
    total: int
    """Leading blocks at any daemon."""


class OwnBlocks:
    """What the native protocol's index holds."""

    def __init__(self, index: BlockIndex, nodes: NodeTable, workers: WorkerTable) -> None:
        self._index = index
        self._nodes = nodes
        self._workers = workers

    def namespace_of(self, instance_id: str) -> bytes | None:
        """None if the id is no namespace's."""
        if not instance_id.startswith(INSTANCE_PREFIX):
            return None
        try:
            namespace = bytes.fromhex(instance_id.removeprefix(INSTANCE_PREFIX))
        except ValueError:
            return None
        return namespace if len(namespace) == NAMESPACE_BYTES else None

    def worker_of(self, namespace: bytes) -> WorkerInfo | None:
        """One that works in the namespace."""
        infos = (state.info for state in self._workers.states())
        return next((info for info in infos if info.namespace == namespace), None)

    def find(self, namespace: bytes, low_keys: Sequence[int]) -> list[OwnBlock | None]:
        """Of each key, where it lies; None if nowhere that can be reached."""
        slots = self._index.find_low(namespace, low_keys)
        there = slots[slots >= 0]
        segments, offsets, generations = self._index.places(there)
        sizes = self._index.extents(there)[1].tolist()
        blocks = iter(
            self._block(segment, offset, generation, size)
            for segment, offset, generation, size in zip(segments, offsets, generations, sizes, strict=True)
        )
        return [next(blocks) if slot >= 0 else None for slot in slots.tolist()]

    def hosts(self, namespace: bytes, low_keys: Sequence[int], media: frozenset[str]) -> list[HostMatch]:
        """Workers that have the prompt's first block at their own daemon. `media` (`mem`, `disk`): only there; empty: all."""
        slots = self._index.find_low(namespace, low_keys)
        missed = np.flatnonzero(slots < 0)
        segments = self._index.segments(slots[: missed[0]] if len(missed) else slots)
        nodes = {index: self._node(index) for index in np.unique(segments).tolist()}
        shown = [index for index, node in nodes.items() if not media or _medium(node) in media]
        hidden = np.flatnonzero(~np.isin(segments, shown))
        segments = segments[: hidden[0]] if len(hidden) else segments
        found = []
        for info in (state.info for state in self._workers.states()):
            own = [index for index, node in nodes.items() if info.node in (node.segment.node, node.segment.disk_of)]
            if info.namespace == namespace and info.node and own:
                away = np.flatnonzero(~np.isin(segments, own))
                local = int(away[0]) if len(away) else len(segments)
                if local:
                    found.append(HostMatch(urlsplit(info.url).netloc, local, len(away), len(segments)))
        return found

    def _node(self, index: int) -> Node:
        node = self._nodes.at(index)
        assert node is not None, "the index holds pages of a segment that is no more"
        return node

    def _block(self, index: int, offset: int, generation: int, size_bytes: int) -> OwnBlock:
        segment = self._node(index).segment
        where = f"{segment.host}:{segment.port}"
        query = f"node={segment.node}&epoch={segment.epoch.hex()}&offset={offset}&generation={generation}"
        return OwnBlock(f"dmp://{where}?{query}&size={size_bytes}")


def _medium(node: Node) -> str:
    return "disk" if node.segment.is_disk else "mem"
