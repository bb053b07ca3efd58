"""Where the PostgreSQL behind the gateway is, and how it is connected to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast
from urllib.parse import parse_qs, unquote, urlsplit

from dbnode.sql.errors import BackendUnreachable
from stratakv.errors import SetupError

CONNECT_TIMEOUT_S = 10.0
CANCEL_TIMEOUT_S = 10.0
_PORT = 5432
ProtocolT = TypeVar("ProtocolT", bound=asyncio.BaseProtocol)
_TLS_DEMANDED = ("require", "verify-ca", "verify-full")


@dataclass(frozen=True, slots=True)
class BackendAddress:
    """A TCP host, or the directory of a Unix socket."""

    host: str
    port: int

    @classmethod
    def from_url(cls, url: str) -> BackendAddress:
        """Of a libpq URL; user, password and database are the client's own. Raises SetupError."""
        parts = urlsplit(url)
        if parts.scheme not in ("postgresql", "postgres"):
            raise SetupError("sql.backend_url: expected postgresql://…")
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        if query.get("sslmode") in _TLS_DEMANDED:
            raise SetupError(
                "sql.backend_url: TLS between the DB node and PostgreSQL is not supported",
                hint="run the DB node on PostgreSQL's host or in its private network, and drop sslmode",
            )
        try:
            port = int(query.get("port") or parts.port or _PORT)
        except ValueError as error:
            raise SetupError("sql.backend_url: expected one host and one port") from error
        host = query.get("host") or unquote(parts.hostname or "") or "localhost"
        if "," in host:
            raise SetupError("sql.backend_url: expected one host")
        return cls(host, port)

    @property
    def socket_path(self) -> str | None:
        """The Unix socket; None for TCP."""
        return f"{self.host}/.s.PGSQL.{self.port}" if self.host.startswith("/") else None

    async def connect(self, make_protocol: Callable[[], ProtocolT]) -> ProtocolT:
        """Raises BackendUnreachable."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                if self.socket_path is not None:
                    _, protocol = await loop.create_unix_connection(make_protocol, self.socket_path)
                else:
                    _, protocol = await loop.create_connection(make_protocol, self.host, self.port)
        except (OSError, TimeoutError) as error:
            reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
            raise BackendUnreachable(
                f"the DB node cannot reach PostgreSQL at {self.host} port {self.port}: {reason}"
            ) from error
        return protocol

    async def send_cancel(self, packet: bytes) -> None:
        """Deliver a CancelRequest; returns when PostgreSQL has acted on it. Raises BackendUnreachable."""
        protocol = await self.connect(_CancelProtocol)
        try:
            protocol.transport.write(packet)
            async with asyncio.timeout(CANCEL_TIMEOUT_S):
                await protocol.closed
        except TimeoutError as error:
            raise BackendUnreachable("PostgreSQL does not answer a cancel request") from error
        finally:
            protocol.transport.close()


class _CancelProtocol(asyncio.Protocol):
    """PostgreSQL answers a cancel by closing the connection."""

    def __init__(self) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)
