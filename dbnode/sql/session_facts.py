"""What may be told of a session: who, from where, and what it is doing. Made by `Session`, shown by the admin database."""

from __future__ import annotations

import enum
from dataclasses import dataclass


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
