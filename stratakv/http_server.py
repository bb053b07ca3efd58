"""One ASGI application on one port, inside the process's own event loop; signals stay with the process.

Used by the DB node's REST face and by workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from stratakv.errors import SetupError
from stratakv.http_head import BoundedHeads
from stratakv.process import port_taken
from stratakv.tls_files import TlsFiles

BACKLOG = 2048
KEEP_ALIVE_S = 75
DATE_S = 1.0
"""How often the Date header of answers is made anew."""
SHUTDOWN_S = 5
"""Connections still busy when the server is told to end are cut after so long; requests were waited for before."""


class _Server(uvicorn.Server):
    """uvicorn without signal handlers, which ends as soon as it is told to."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._told_to_end = asyncio.Event()

    def end(self) -> None:
        self.should_exit = True
        self._told_to_end.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        """Wakes up for the Date header only; uvicorn's own looks ten times a second whether to end."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._told_to_end.wait(), DATE_S)


class HttpServer:
    """The listening socket and the server on it."""

    def __init__(
        self, host: str, port: int, section: str, *, port_setting: str = "", tls: TlsFiles | None = None
    ) -> None:
        """Binds the port, so that a taken one is known at once. Raises SetupError that names the section's settings."""
        self._tls = tls
        self._socket = _bind(host, port, section, port_setting or f"{section}.port")
        self._server: _Server | None = None

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    async def run(self, app: Any) -> None:
        """Serve until `stop`."""
        config = uvicorn.Config(
            app,
            http=BoundedHeads,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=SHUTDOWN_S,
            ssl_certfile=self._tls.certificate if self._tls is not None else None,
            ssl_keyfile=self._tls.key if self._tls is not None else None,
        )
        self._server = _Server(config)
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        if self._server is not None:
            self._server.end()


def _bind(host: str, port: int, section: str, port_setting: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP: asyncio sends small writes at once (TCP_NODELAY) only on connections that say so, and answers have two.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise port_taken(host, port, port_setting) from None
        raise SetupError(f"{section}.host = {host}: cannot listen there: {error.strerror}") from None
    listener.setblocking(False)
    return listener
