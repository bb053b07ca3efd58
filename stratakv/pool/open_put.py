"""Writing the pages of a put at its daemon, and taking back what the daemon has granted if that fails. Used by all writers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from stratakv.errors import StrataError
from stratakv.pool.dmp_client import ConnectionCache, DmpConnection
from stratakv.pool.errors import TransportError
from stratakv.wire import Segment

CONNECT_S_MAX = 2.0
"""For connecting to a daemon, and for telling it that a put has failed."""


@contextmanager
def open_put(
    connections: ConnectionCache, segment: Segment, put_id: bytes, *, deadline: float
) -> Iterator[DmpConnection]:
    """The connection to write on. Raises TransportError, and what is raised inside."""
    connection = connections.get(segment, deadline=min(deadline, time.monotonic() + CONNECT_S_MAX))
    try:
        yield connection
    except TransportError as error:
        connections.drop(connection, error.message)
        raise
    except StrataError:
        _release(connections, connection, put_id)
        raise
    connection.transport.put_closed(put_id)


def _release(connections: ConnectionCache, connection: DmpConnection, put_id: bytes) -> None:
    try:
        connection.release(put_id, deadline=time.monotonic() + CONNECT_S_MAX)
    except TransportError as error:
        connections.drop(connection, error.message)
