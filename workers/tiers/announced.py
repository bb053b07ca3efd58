"""Pages that another worker has not finished, loaded layer by layer as it tells of them. Made by `Tiers` for hand-overs.

Nothing pins these pages, and no header says yet what they are. A layer counts as loaded only if the copy in L1 has the checksum
that its writer told for it: whatever became of the place meanwhile, those are the bytes that were written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from stratakv.pool.dmp_client import ConnectionCache
from stratakv.pool.errors import TransportError
from stratakv.pool.pages import PageReader, ReadPages
from stratakv.pool.transport import Cancellation
from stratakv.wire import Extent, Segment
from workers.tiers.window import Window


class AnnouncedLoad:
    """Pages of one put. `read` is called from one thread at a time, never from the event loop."""

    def __init__(
        self,
        segment: Segment,
        extents: Sequence[Extent],
        window: Window,
        reader: PageReader,
        connections: ConnectionCache,
        timeout_s: float,
    ) -> None:
        self._segment = segment
        self._extents = extents
        self._window = window
        self._reader = reader
        self._connections = connections
        self._timeout_s = timeout_s
        self._cancellation = Cancellation()
        self._pages: ReadPages | None = None
        self.seconds = 0.0
        """Spent on reading till now."""

    def read(self, layers: Sequence[int], checksums: bytes) -> None:
        """On return these layers of every page are in L1 and verified.

        Raises DamagedPage, TransportError, TransferCancelled, ValueError; there may be anything in the L1 blocks then.
        """
        started = time.monotonic()
        deadline = started + self._timeout_s
        connection = self._connections.get(self._segment, deadline=deadline)
        if self._pages is None or self._pages.connection is not connection:
            self._pages = self._reader.without_headers(connection, self._extents)
        self._pages.expect(layers, checksums)
        try:
            self._pages.read_layers(layers, self._window.memory, deadline=deadline, cancellation=self._cancellation)
        except TransportError as error:
            self._connections.drop(connection, error.message)
            raise
        for layer in layers:
            self._window.publish(layer)
        self.seconds += time.monotonic() - started

    def cancel(self) -> None:
        """Have a `read` that runs end soon, and every later one fail."""
        self._cancellation.cancel()
