"""A new client until its startup packet is there: encryption is declined, cancels are passed on, sessions are opened."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, cast

from dbnode.sql.errors import DirectTls, ProtocolViolation
from dbnode.sql.messages import Severity, error_response
from dbnode.sql.startup import StartupKind, StartupPacket, StartupReader
from stratakv.log import EventLogger

if TYPE_CHECKING:
    from dbnode.sql.relay import Relay

log = EventLogger(__name__)

_DECLINED = b"N"


class ClientHandshake(asyncio.Protocol):
    """Reads startup packets; the transport then goes to a session."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._reader = StartupReader()
        self._declined: set[StartupKind] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_done = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
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
        try:
            while not self._is_done and (packet := self._reader.next_packet()) is not None:
                self._on_packet(packet)
        except DirectTls:
            log.info("direct_tls_refused")
            self.close()
        except ProtocolViolation as error:
            self._transport.write(error_response(error, Severity.FATAL))
            self.close()

    def close(self) -> None:
        """Refuse the client, or end a cancel."""
        self._finish()
        self._transport.close()

    def _on_packet(self, packet: StartupPacket) -> None:
        if packet.kind in (StartupKind.TLS, StartupKind.GSS_ENCRYPTION):
            if packet.kind in self._declined:
                raise ProtocolViolation("encryption was declined already")
            self._declined.add(packet.kind)
            self._transport.write(_DECLINED)
            return
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
