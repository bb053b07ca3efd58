"""Messages of `stratakv.wire` by which operators look at what the pool holds, and rule it. Import them from there."""

from __future__ import annotations

from stratakv.wire_parts import CacheRule, Message, NamespaceState, PageAt


class Flush(Message, frozen=True):
    """Drop all pages that nobody holds a lease on, of one namespace or of all."""

    namespace: bytes = b""


class Flushed(Message, frozen=True):
    num_blocks: int


class SetCacheRule(Message, frozen=True):
    """Takes the place of the namespace's rule before."""

    rule: CacheRule


class ListNamespaces(Message, frozen=True):
    """Namespaces with pages, with workers or with a rule."""


class Namespaces(Message, frozen=True):
    namespaces: list[NamespaceState]


class ListPages(Message, frozen=True):
    """The pages of a node, part by part; pages that come or go meanwhile may be left out."""

    node: str
    after: int = -1
    """`Pages.last` of the part before."""


class Pages(Message, frozen=True):
    pages: list[PageAt]
    """Empty behind the last part."""
    last: int = -1


class PinPrefix(Message, frozen=True):
    """Keep the leading blocks of `keys` that are in the pool where they are, whatever room is needed for.

    In the meta server's memory only: its restart ends all pins.
    """

    namespace: bytes
    keys: bytes
    pin_s: float


class Pinned(Message, frozen=True):
    num_blocks: int
    pin_id: int
    """0 if there was nothing to pin."""


class Unpin(Message, frozen=True):
    """End one pin; one that is over already is fine."""

    pin_id: int


class SetDraining(Message, frozen=True):
    """Have a daemon's pages moved to others, and give it no new ones; asked again, it tells how far that is.

    In the meta server's memory only, and until the daemon's next start.
    """

    node: str
    """Of the daemon's memory; its disk is drained with it."""
    is_draining: bool
    is_whole: bool = False
    """Also what was never read since it was written."""


class DrainProgress(Message, frozen=True):
    is_done: bool
    """Nothing more moves: the daemon may be stopped."""
    pages_moved: int
    pages_left: int
    """Worth keeping and still there; when it is done, those that nobody else has room for."""
    bytes_left: int


class SetNodeLimit(Message, frozen=True):
    """Let a daemon use only so much of its memory; until its next start."""

    node: str
    limit_bytes: int
    """0: all of it."""


class GetStats(Message, frozen=True):
    pass


class Stats(Message, frozen=True):
    blocks: int
    bytes_committed: int
    puts_pending: int
    leases: int
    nodes: int
    workers: int
    lookups: int
    lookup_hits: int
    evictions: int
    demoted: int = 0
    """Pages that went to disk."""
    promoted: int = 0
    """Pages that came back from disk."""
    pins: int = 0
    evicted_age_s: float = 0.0
    """Median time since the pages that were evicted last had been asked for."""
    replicas: int = 0
    """Pages whose blocks lie at another place first."""
    replica_bytes: int = 0
    replicas_made: int = 0
    replicas_removed: int = 0
    replicas_promoted: int = 0
    """Those that took the stead of a first place that was lost."""
    replica_reads: int = 0
    """Pages that readers were told of at such a place."""
