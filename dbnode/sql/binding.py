"""Ties connections of the private listener to sessions of the gateway.

The gateway issues a nonce for a session and has its backend show it to the listener; a nonce works once. Binding only adds
precision (a cancel reaches the model at once, usage is told by session): calls of unbound sessions work the same.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Protocol

from dbnode.sql.session_hints import SessionHints
from stratakv.errors import PermissionDenied

NONCE_BYTES = 16


class UnknownNonce(PermissionDenied):
    """The nonce was never issued, is used up, or belongs to another backend."""

    sqlstate = "28000"


class BoundCaller(Protocol):
    """What a connection of the listener lets the gateway do with it."""

    def interrupt(self) -> None:
        """Stop the call that runs, and let PostgreSQL look for its cancel at once."""
        ...

    def statement_ended(self) -> None:
        """Nobody waits for the call any more."""
        ...

    def close(self) -> None:
        """The session has ended."""
        ...


class SessionBinding:
    """One session of the gateway, as the listener knows it."""

    __slots__ = ("caller", "hints", "name", "pid")

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        self.caller: BoundCaller | None = None
        self.hints: SessionHints | None = None
        """None if nothing is looked ahead for; only the gateway sets it."""


class BindingRegistry:
    """Nonces that are out, and whose."""

    def __init__(self, make_nonce: Callable[[], str] = lambda: secrets.token_hex(NONCE_BYTES)) -> None:
        self._make_nonce = make_nonce
        self._issued: dict[str, SessionBinding] = {}

    def issue(self, binding: SessionBinding) -> str:
        """A nonce for the session; at most one per session is out, since its owner revokes it after the attempt."""
        nonce = self._make_nonce()
        self._issued[nonce] = binding
        return nonce

    def revoke(self, nonce: str) -> None:
        """The attempt is over."""
        self._issued.pop(nonce, None)

    def redeem(self, nonce: str, pid: int, caller: BoundCaller) -> SessionBinding:
        """Raises UnknownNonce.

        A pooler between gateway and PostgreSQL shows by another pid: its backends change hands, so they stay unbound.
        """
        binding = self._issued.pop(nonce, None)
        if binding is None or binding.pid != pid:
            raise UnknownNonce("this session cannot be bound")
        if binding.caller is not None:
            binding.caller.close()
        binding.caller = caller
        return binding
