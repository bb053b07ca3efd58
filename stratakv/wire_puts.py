"""Messages of `stratakv.wire` by which pages are written, in two phases. Import them from there."""

from __future__ import annotations

from stratakv.wire_parts import Extent, Message, Segment


class PutStart(Message, frozen=True):
    """Ask for room for pages; nothing can be found until `PutEnd`."""

    put_id: bytes
    namespace: bytes
    keys: bytes
    page_bytes: int
    block_size: int
    prefer_node: str | None = None
    worker: str = ""
    timeout_s: float = 30.0
    cost_us: int = 0
    """To compute one page again, in microseconds; 0 while that is not known. What a page is worth depends on it."""
    copies_from: str = ""
    """The pages are copied from this node: wanted are those that lie there. If it is drained it gives them up, else they are
    replicas, and only those are wanted that it was ordered to copy. `block_size` may be 0."""
    owner: int = 0
    """The tenant that has the pages computed; 0: none. Copies are of whom the pages are."""


class PutGrant(Message, frozen=True):
    """Room for the missing pages, or for the first of them that fit, all on one segment.

    Pages that are there already, or that another writer is just writing, are not wanted. With an empty `wanted` there is no
    put: nothing is to be ended.
    """

    wanted: list[int]
    """Indexes into the request's keys, ascending."""
    segment: Segment | None = None
    term: int = 0
    """Of the leader that grants it; daemons refuse what leaders of the past have granted."""


class PutEnd(Message, frozen=True):
    """All bytes and headers of the wanted pages are written."""

    put_id: bytes
    epoch: bytes
    """Of the segment that was granted."""
    extents: list[Extent]
    """One for each wanted page, in order."""


class PutRevoke(Message, frozen=True):
    """The writer gives up; its extents may be freed."""

    put_id: bytes
