"""What a follower of the meta server's events knows: which block lies at which node. No sockets: events and parts go in.

A view begins from a snapshot in parts. The parts are of different times: events that arrive while a part is awaited are held,
those up to the part's sequence are applied before it, the others after it. So the view is the server's again as soon as the
last part is in. Any gap, and it begins anew. Used by `stratakv.pool.follower`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from stratakv.keys import KEY_BYTES
from stratakv.wire_events import EventKind, EventSnapshot, PoolEvent

EVENTS_HELD_MAX = 10_000
"""While one part is awaited; the snapshot begins anew beyond it."""


class PoolView:
    """Blocks and nodes as of `sequence`."""

    def __init__(self) -> None:
        self.node_of: dict[tuple[bytes, bytes], str] = {}
        """(namespace, key) → node, also while the node is down."""
        self.is_up: dict[str, bool] = {}
        self.epoch = b""
        self.sequence = 0
        self.gaps = 0
        """How often events were lost, or the meta server began anew."""
        self.is_whole = False
        """Whether this is what the meta server had at `sequence`."""
        self._next = 0
        self._is_asked = self._is_stale = False
        self._part: EventSnapshot | None = None
        self._held: deque[PoolEvent] = deque()

    def ask(self) -> int | None:
        """What `GetEventSnapshot.after` is to be asked with; None while nothing is needed, or a part is on its way."""
        if self.is_whole or self._is_asked or self._part is not None:
            return None
        self._is_asked = True
        return self._next

    def unanswered(self) -> None:
        """The part that was asked for will not come."""
        self._is_asked = self._is_stale = False

    def take_event(self, event: PoolEvent) -> None:
        """In any order, any number lost."""
        if len(self._held) >= EVENTS_HELD_MAX:
            self._begin_anew()
        self._held.append(event)
        self._go_on()

    def take_part(self, part: EventSnapshot) -> None:
        """The answer to what was asked last."""
        is_stale = self._is_stale
        self.unanswered()
        if is_stale:
            return
        if self._next == 0:
            self.node_of.clear()
            self.epoch, self.sequence = part.epoch, part.sequence
            self._held = deque(e for e in self._held if e.epoch == part.epoch and e.sequence > part.sequence)
        elif part.epoch != self.epoch or part.sequence < self.sequence:
            self._begin_anew()
            return
        self._part = part
        self._go_on()

    def _go_on(self) -> None:
        while self._held or self._part is not None:
            if self._part is not None and self.sequence >= self._part.sequence:
                self._merge(self._part)
            elif not self._held or (self._is_asked and self._part is None):
                return
            else:
                self._apply(self._held.popleft())

    def _merge(self, part: EventSnapshot) -> None:
        for group in part.blocks:
            for key in _keys(group.keys):
                self.node_of[group.namespace, key] = group.node
        self.is_up = {mark.node: mark.is_up for mark in part.nodes}
        self._part, self._next = None, part.next
        self.is_whole = not part.next

    def _apply(self, event: PoolEvent) -> None:
        if event.epoch == self.epoch and event.sequence <= self.sequence:
            return
        is_next = event.epoch == self.epoch and event.sequence == self.sequence + 1
        if not is_next or event.kind is EventKind.ALIVE:
            self._begin_anew()
            return
        self.sequence = event.sequence
        if event.kind is EventKind.BLOCKS_REMOVED:
            for key in _keys(event.keys):
                self.node_of.pop((event.namespace, key), None)
        elif event.kind in (EventKind.BLOCKS_ADDED, EventKind.BLOCKS_MOVED):
            self.node_of.update({(event.namespace, key): event.node for key in _keys(event.keys)})
        elif event.kind is EventKind.NODE_GONE:
            self.is_up.pop(event.node, None)
            self.node_of = {block: node for block, node in self.node_of.items() if node != event.node}
        else:
            self.is_up[event.node] = event.kind is EventKind.NODE_UP

    def _begin_anew(self) -> None:
        """Nothing of before is of use: neither parts nor events, which are in any new snapshot."""
        self.gaps += self.is_whole
        self.is_whole = False
        self._is_stale = self._is_asked
        self._next, self._part = 0, None
        self._held.clear()


def _keys(packed: bytes) -> Iterator[bytes]:
    return (packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES))
