"""TLS over a transport that is open already, as a transport of its own. Used on both legs of the relay and by the listener.

Its input may have been read before it was known to be TLS (a client may start with its handshake), which the event loop's own
`start_tls` cannot take over. It buffers nothing itself: limits and pauses are those of the transport below.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

ALPN = "postgresql"
_RECORD_BYTES = 16 * 1024
"""One read of OpenSSL returns one record at most."""


class ProtocolNotNamed(ConnectionError):
    """The TLS is right, but might be meant for another service."""


@dataclass(frozen=True, slots=True)
class EndPoint:
    """The server of a TLS connection, as channel binding knows it (tls-server-end-point, RFC 5929)."""

    digest: bytes | None = field(repr=False)
    """Of its certificate; None if that is signed in a way that names no hash."""


def end_point_of(transport: asyncio.BaseTransport | None) -> EndPoint | None:
    """None: the transport is not under TLS."""
    return transport.end_point if isinstance(transport, TlsTransport) else None


class TlsTransport(asyncio.Transport, asyncio.Protocol):
    """Between `lower` and `protocol`, which hears `connection_made` when the handshake is over.

    Until then only `opened` tells: its exception is ssl.SSLError or OSError. With `alpn_required` the other side must have
    agreed on PostgreSQL's protocol in the handshake.
    """

    def __init__(
        self,
        lower: asyncio.Transport,
        protocol: asyncio.BaseProtocol,
        context: ssl.SSLContext,
        find_end_point: Callable[[ssl.SSLObject], EndPoint],
        *,
        server_side: bool,
        server_hostname: str | None = None,
        alpn_required: bool = False,
    ) -> None:
        super().__init__()
        self._lower = lower
        self._protocol = cast(asyncio.Protocol, protocol)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname
        )
        self._find_end_point = find_end_point
        self._alpn_required = alpn_required
        self._is_open = False
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.end_point = EndPoint(None)

    def start(self, received: bytes = b"") -> None:
        """Begin the handshake; `received` is what was read from `lower` before."""
        self._lower.set_protocol(self)
        self._incoming.write(received)
        self._shake_hands()
        if not self._lower.is_closing():
            self._lower.resume_reading()

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
            if self._alpn_required and self._tls.selected_alpn_protocol() != ALPN:
                raise ProtocolNotNamed("the client did not name PostgreSQL's protocol (ALPN)")
        except ssl.SSLWantReadError:
            self._flush()
            return
        except (OSError, ValueError) as error:  # ssl.SSLError is one of the first
            self._flush()  # the alert
            self._fail(error)
            return
        self._flush()
        self._is_open = True
        self.end_point = self._find_end_point(self._tls)
        if not self.opened.done():
            self.opened.set_result(None)
        self._protocol.connection_made(self)
        self._read()

    def _fail(self, error: Exception) -> None:
        if not self.opened.done():
            self.opened.set_exception(error)
        self._lower.close()

    # From below

    def data_received(self, data: bytes) -> None:
        self._incoming.write(data)
        if self._is_open:
            self._read()
        elif not self._lower.is_closing():
            self._shake_hands()

    def _read(self) -> None:
        parts, ended = [], False
        try:
            while self._incoming.pending or self._tls.pending():
                part = self._tls.read(_RECORD_BYTES)
                if not part:
                    ended = True
                    break
                parts.append(part)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            ended = True  # closed properly, or damaged: nothing that follows is the other side's
        self._flush()
        if parts:
            self._protocol.data_received(parts[0] if len(parts) == 1 else b"".join(parts))
        if ended:
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(
                error or ConnectionResetError("the connection was closed during the TLS handshake")
            )
        elif self._is_open:
            self._protocol.connection_lost(error)

    def pause_writing(self) -> None:
        if self._is_open:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._is_open:
            self._protocol.resume_writing()

    # From above

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if data and not self._lower.is_closing():
            self._tls.write(data)  # a memory BIO takes all of it
            self._flush()

    def _flush(self) -> None:
        if self._outgoing.pending and not self._lower.is_closing():
            self._lower.write(self._outgoing.read())

    def close(self) -> None:
        if self._lower.is_closing():
            return
        if self._is_open:
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()  # says goodbye; the answer is not waited for
            self._flush()
        self._lower.close()

    def abort(self) -> None:
        self._lower.abort()

    def is_closing(self) -> bool:
        return self._lower.is_closing()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast(asyncio.Protocol, protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As of any transport of the event loop that is under TLS."""
        if name == "ssl_object":
            return self._tls
        return self._tls.cipher() if name == "cipher" else self._lower.get_extra_info(name, default)

    def is_reading(self) -> bool:
        return self._lower.is_reading()

    def pause_reading(self) -> None:
        self._lower.pause_reading()

    def resume_reading(self) -> None:
        self._lower.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._lower.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self._lower.get_write_buffer_size()
