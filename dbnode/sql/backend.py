"""Where the PostgreSQL behind the gateway is, and how it is connected to."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast
from urllib.parse import parse_qs, unquote, urlsplit

from dbnode.sql.backend_tls import BackendTls, TlsNegotiation
from dbnode.sql.errors import BackendUnreachable
from dbnode.sql.sockets import keep_alive
from dbnode.sql.startup import TLS_DECLINED, TLS_GIVEN
from stratakv.errors import SetupError

CONNECT_TIMEOUT_S = 10.0
CANCEL_TIMEOUT_S = 10.0
_PORT = 5432
ProtocolT = TypeVar("ProtocolT", bound=asyncio.BaseProtocol)


@dataclass(frozen=True, slots=True)
class BackendAddress:
    """A TCP host, or the directory of a Unix socket."""

    host: str
    port: int
    tls: BackendTls | None = None
    """Never on a Unix socket."""

    @classmethod
    def from_url(cls, url: str) -> BackendAddress:
        """Of a libpq URL; user, password and database are the client's own. Raises SetupError."""
        parts = urlsplit(url)
        if parts.scheme not in ("postgresql", "postgres"):
            raise SetupError("sql.backend_url: expected postgresql://…")
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        try:
            port = int(query.get("port") or parts.port or _PORT)
        except ValueError as error:
            raise SetupError("sql.backend_url: expected one host and one port") from error
        host = query.get("host") or unquote(parts.hostname or "") or "localhost"
        if "," in host:
            raise SetupError("sql.backend_url: expected one host")
        return cls(host, port, None if host.startswith("/") else BackendTls.from_query(query, host))

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
                    return (await loop.create_unix_connection(make_protocol, self.socket_path))[1]
                protocol = None if self.tls is None else await self._connect_tls(self.tls, make_protocol())
                if protocol is None:
                    transport, protocol = await loop.create_connection(make_protocol, self.host, self.port)
                    keep_alive(transport)
                return protocol
        except (OSError, TimeoutError) as error:  # an ssl.SSLError is an OSError
            raise self._unreachable(_reason(error)) from error

    async def _connect_tls(self, tls: BackendTls, protocol: ProtocolT) -> ProtocolT | None:
        """None: it fails, and may be done without. Raises OSError, BackendUnreachable."""
        transport, answer = await self.negotiate_tls()
        try:
            if answer == TLS_GIVEN:
                wrapped = tls.wrap(transport, protocol)
                wrapped.start()
                await wrapped.opened
                return protocol
            if answer != TLS_DECLINED:
                raise self._unreachable("its answer to the request for TLS is not understood")
            if tls.is_required:
                raise self._unreachable("it does not support TLS, which the sslmode of sql.backend_url demands")
        except BaseException as error:
            transport.abort()
            if isinstance(error, ssl.SSLError) and not tls.is_required:
                return None
            raise
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        transport.resume_reading()
        return protocol

    async def negotiate_tls(self) -> tuple[asyncio.Transport, bytes]:
        """A connection whose reading is paused, and PostgreSQL's answer to the request for TLS. Raises OSError."""
        loop = asyncio.get_running_loop()
        transport, negotiation = await loop.create_connection(TlsNegotiation, self.host, self.port)
        try:
            keep_alive(transport)
            return transport, await negotiation.answer
        except BaseException:
            transport.abort()
            raise

    async def open_tls_passage(self, *, direct: bool) -> tuple[asyncio.Transport, bytes]:
        """A TCP connection whose reading is paused, and what PostgreSQL says about TLS there; nothing if it is `direct`.

        Raises BackendUnreachable.
        """
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                if not direct:
                    return await self.negotiate_tls()
                transport, _ = await asyncio.get_running_loop().create_connection(
                    asyncio.Protocol, self.host, self.port
                )
        except (OSError, TimeoutError) as error:
            raise self._unreachable(_reason(error)) from error
        transport.pause_reading()
        keep_alive(transport)
        return transport, b""

    def _unreachable(self, reason: str) -> BackendUnreachable:
        return BackendUnreachable(f"the DB node cannot reach PostgreSQL at {self.host} port {self.port}: {reason}")

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


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not to be trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS fails: {error.reason or error}"
    if isinstance(error, TimeoutError):
        return "no answer"
    return error.strerror or str(error)


class _CancelProtocol(asyncio.Protocol):
    """PostgreSQL answers a cancel by closing the connection."""

    def __init__(self) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)
