"""A new client until its startup packet is there: encryption is agreed on, cancels are passed on, sessions are opened."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from dbnode.sql.errors import DirectTls, ProtocolViolation, TlsRequired
from dbnode.sql.messages import Severity, error_response
from dbnode.sql.sockets import keep_alive
from dbnode.sql.startup import TLS_DECLINED, TLS_GIVEN, StartupKind, StartupPacket, StartupReader
from dbnode.sql.tls_transport import TlsTransport
from stratakv.errors import StrataError
from stratakv.log import EventLogger
from stratakv.settings import TlsMode

if TYPE_CHECKING:
    from dbnode.sql.relay import Relay

log = EventLogger(__name__)

_ENCRYPTION = frozenset({StartupKind.TLS, StartupKind.GSS_ENCRYPTION})


class ClientHandshake(asyncio.Protocol):
    """Reads startup packets; the transport then goes to a session."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._reader = StartupReader()
        self._answered: set[StartupKind] = set()
        """Encryption is not to be asked for twice, nor once there is some."""
        self._timer: asyncio.TimerHandle | None = None
        self._is_done = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there, or has ended its TLS handshake."""
        self._transport = cast(asyncio.Transport, transport)
        if isinstance(transport, TlsTransport):
            return
        keep_alive(transport)
        if not self._relay.admit(self):
            self._is_done = True
            self._transport.abort()
            return
        timeout_s = self._relay.settings.startup_timeout_s
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._transport.abort)

    def connection_lost(self, error: Exception | None) -> None:
        self._finish()

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        self._read_packets()

    def _read_packets(self) -> None:
        try:
            while not self._is_done and (packet := self._reader.next_packet()) is not None:
                self._on_packet(packet)
        except DirectTls:
            self._on_direct_tls()
        except (ProtocolViolation, TlsRequired) as error:
            self._refuse(error)

    def close(self) -> None:
        """Refuse the client, or end a cancel."""
        self._finish()
        self._transport.close()

    def _refuse(self, error: StrataError) -> None:
        self._transport.write(error_response(error, Severity.FATAL))
        self.close()

    def _on_packet(self, packet: StartupPacket) -> None:
        if packet.kind in _ENCRYPTION:
            if packet.kind in self._answered:
                raise ProtocolViolation("encryption was answered already")
            if packet.kind is StartupKind.TLS:
                self._on_tls_request()
            else:
                self.decline(packet.kind)
            return
        if packet.kind is StartupKind.SESSION and self._relay.tls.mode is TlsMode.REQUIRE and not self._is_encrypted:
            raise TlsRequired("the DB node lets nobody in without TLS", hint="Connect with sslmode=require.")
        self._transport.pause_reading()
        if packet.kind is StartupKind.CANCEL:
            self._is_done = True
            self._relay.start_cancel(self, packet)
        else:
            self._finish()
            self._relay.open_session(self._transport, packet, self._reader.take_rest())

    def _finish(self) -> None:
        self._is_done = True
        if self._timer is not None:
            self._timer.cancel()
        self._relay.handshakes.discard(self)

    # TLS

    @property
    def _is_encrypted(self) -> bool:
        return isinstance(self._transport, TlsTransport)

    def hand_over(self) -> None:
        """The transport belongs to somebody else now."""
        self._finish()

    def decline(self, kind: StartupKind = StartupKind.TLS) -> None:
        """The client may go on without."""
        self._answered.add(kind)
        self._transport.write(TLS_DECLINED)

    def go_on(self) -> None:
        """TLS has been declined after its reading was paused."""
        self._transport.resume_reading()
        self._read_packets()

    def _on_tls_request(self) -> None:
        is_passed = self._relay.tls.mode is TlsMode.PASSTHROUGH
        if not is_passed and self._relay.tls.current is None:
            self.decline()
            return
        if self._reader.take_rest():
            # In plain text, perhaps by somebody between us: it must not count as said under TLS (CVE-2021-23214).
            raise ProtocolViolation("received unencrypted data after a request for TLS")
        if is_passed:
            self._transport.pause_reading()
            self._relay.start_passage(self, self._transport, b"")
        else:
            self._start_tls(b"", direct=False)

    def _on_direct_tls(self) -> None:
        """The client begins with the handshake itself; it must name the protocol in it (PostgreSQL 17)."""
        if self._is_encrypted or self._answered:
            self._refuse(ProtocolViolation("TLS was not agreed on"))
        elif self._relay.tls.mode is TlsMode.PASSTHROUGH:
            self._transport.pause_reading()
            self._relay.start_passage(self, self._transport, self._reader.take_rest())
        elif self._relay.tls.current is None:
            log.info("direct_tls_refused")
            self.close()
        else:
            self._start_tls(self._reader.take_rest(), direct=True)

    def _start_tls(self, received: bytes, *, direct: bool) -> None:
        offered = self._relay.tls.current
        assert offered is not None, "checked by the callers"
        self._answered |= _ENCRYPTION
        self._transport.pause_reading()
        if not direct:
            self._transport.write(TLS_GIVEN)
        tls = offered.wrap(self._transport, self, alpn_required=direct)
        tls.opened.add_done_callback(self._on_tls_opened)
        tls.start(received)

    def _on_tls_opened(self, opened: asyncio.Future[None]) -> None:
        if (error := opened.exception()) is not None:
            log.info("tls_handshake_failed", reason=str(error))
            self._finish()
