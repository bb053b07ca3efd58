"""What may be told of a session: who, from where, and what it is doing. Shown by the admin database."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dbnode.sql.sides import Phase

if TYPE_CHECKING:
    from dbnode.sql.session import Session

_BEFORE = frozenset({Phase.CONNECTING, Phase.LOGIN})
_HELD = frozenset({Phase.HOLDING, Phase.COLLECTING})


class SessionState(enum.StrEnum):
    """What a session is doing."""

    LOGIN = "login"
    IDLE = "idle"
    ACTIVE = "active"
    """A statement runs, or is held to look ahead in it."""
    WAITING = "waiting"
    """The statement waits for the model."""


@dataclass(frozen=True, slots=True)
class SessionFacts:
    """One session, now."""

    name: str
    user: str
    database: str
    application: str
    address: str
    port: int
    tls: str
    """Protocol version; empty without."""
    pid: int | None
    """Of the backend; None before it is known."""
    state: SessionState
    server_state: SessionState
    """Of the backend: active or idle, or login."""
    connected_at_s: float
    requested_at_s: float | None
    """When the statement that runs began, if that was noted."""


@dataclass(slots=True)
class Traffic:
    """Sums of the sessions of one database."""

    num_queries: int = 0
    """Queries and batches that have ended."""
    received_bytes: int = 0
    """From clients."""
    sent_bytes: int = 0


def facts_of(session: Session) -> SessionFacts:
    """What is so now."""
    meter = session.relay.book.of(session.name)
    server, transport, packet = SessionState.IDLE, session.client.transport, session.packet
    if session.phase in _BEFORE:
        server = SessionState.LOGIN
    elif session.is_busy:
        server = SessionState.ACTIVE
    state = SessionState.ACTIVE if session.phase in _HELD else server
    address = transport.get_extra_info("peername") if transport is not None else None
    encryption = transport.get_extra_info("cipher") if transport is not None else None
    return SessionFacts(
        name=session.name,
        user=packet.user,
        database=packet.database,
        application=packet.parameters.get("application_name", ""),
        address=str(address[0]) if address else "",
        port=int(address[1]) if address else 0,
        tls=str(encryption[1]) if encryption else "",
        pid=session.cancel_key.pid if session.cancel_key is not None else None,
        state=SessionState.WAITING if meter is not None and meter.num_waiting else state,
        server_state=server,
        connected_at_s=session.connected_at_s,
        requested_at_s=meter.started_at_s if meter is not None else None,
    )
