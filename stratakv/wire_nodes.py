"""Messages of `stratakv.wire` by which daemons report, and are told what to do. Import them from there."""

from __future__ import annotations

import msgspec

from stratakv.wire_parts import Extent, Message, Move, MovedPage, Segment


class RegisterNode(Message, frozen=True):
    """A daemon announces its segment; the epochs before it are void from here on."""

    segment: Segment


class Registered(Message, frozen=True):
    heartbeat_s: float
    """Send a heartbeat this often; after three missed ones the sender counts as gone."""


class HeartbeatNode(Message, frozen=True):
    node: str
    epoch: bytes
    used_bytes: int
    free_bytes: int
    undecided_puts: list[bytes] = []
    """Puts whose writer's time ran out: does the meta server know them as finished?"""
    freed: list[Extent] = []
    """Extents of earlier `NodeOrders.free` that are free now."""
    read_only: bool = False
    """A disk that takes no more pages."""
    limit_bytes: int = 0
    """As the daemon was told last; a meta server that was started anew learns it from here."""


class NodeOrders(Message, frozen=True):
    """Reply to a daemon's heartbeat."""

    known: bool
    """False: the meta server does not know this epoch; register again."""
    free: list[Extent] = []
    """No longer in any index; to be freed (sent until reported in `freed`)."""
    moves: list[Move] = []
    """To be copied and reported with `ReportMoves`; not repeated until that, or a minute later."""
    moves_away: list[Move] = []
    """To be copied to another daemon, by puts with `copies_from`; those that fail are reported with `ReportMoves`."""
    committed_puts: list[bytes] = []
    void_puts: list[bytes] = []
    """Those of `undecided_puts` that were finished, and those that never will be."""
    limit_bytes: int = 0
    """Of the segment, no more shall be in use; the host gets the rest of the memory back. 0: all of it."""


class ReportMoves(Message, frozen=True):
    """These pages were copied, durably where the target is a disk. Also for pages that a disk has moved within itself."""

    source_node: str
    source_epoch: bytes
    target_node: str
    target_epoch: bytes
    pages: list[MovedPage]
    failed: list[Extent] = []
    """Sources that were not copied after all."""


class MovesTaken(Message, frozen=True):
    """The other pages are found at their targets from now on; their sources are ordered free."""

    refused: list[int]
    """Indexes of pages that were no longer at their source: their targets are the daemon's to free."""


class ReconcilePages(Message, frozen=True):
    """A disk tells, part by part, which pages it has found whole, before they can be found again."""

    node: str
    epoch: bytes
    extents: list[Extent]
    is_first: bool
    is_last: bool


class Reconciled(Message, frozen=True):
    """Reply to each part."""

    unknown: list[Extent]
    """Those of this part that are in no index: the daemon's to free."""


class ListNodes(Message, frozen=True):
    """Segments whose daemons' heartbeats arrive."""


class NodeState(msgspec.Struct, frozen=True, omit_defaults=True):
    segment: Segment
    used_bytes: int
    free_bytes: int
    read_only: bool = False
    """A disk that takes no more pages."""
    is_draining: bool = False
    limit_bytes: int = 0
    """Of the segment, no more is used; 0: all of it."""


class Nodes(Message, frozen=True):
    nodes: list[NodeState]
