"""HTTP connections whose requests must begin in time and with a head of bounded size. Used by `stratakv.http_server`.

uvicorn bounds neither: a client that opens connections and says nothing, or never ends its headers, would hold them for ever.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT_S = 60.0
"""From the beginning of a connection or of a request to the end of the request's headers."""
HEAD_BYTES_MAX = 64 * 1024
"""Of the request line and headers; what has come with them in one piece may be more."""


class BoundedHeads(HttpToolsProtocol):
    """One connection. Keep-alive between requests is uvicorn's."""

    _timer: asyncio.TimerHandle | None = None
    _num_bytes = 0
    """Of the head that is not whole yet."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._timer is None or self.transport.is_closing():
            return
        self._num_bytes += len(data)
        if self._num_bytes > HEAD_BYTES_MAX:
            self.send_400_response("The request's head is too long.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:
            self._begin()

    def on_headers_complete(self) -> None:
        self._end()
        super().on_headers_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """An upgrade that is not offered is passed over, as the protocol has it."""

    def _begin(self) -> None:
        self._num_bytes = 0
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
