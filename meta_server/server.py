"""The meta server's process: opens the store, rebuilds the index, answers messages until it is told to stop."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

import msgspec

from meta_server.errors import failure_of
from meta_server.fill import Filler
from meta_server.handlers import Handlers
from meta_server.kvcm.server import KvcmServer
from meta_server.metrics import metrics_app
from meta_server.router_socket import RouterSocket
from meta_server.store import Store
from stratakv import migrate, wire
from stratakv.errors import InvalidRequest, Overloaded, SetupError, StrataError
from stratakv.http_server import HttpServer
from stratakv.log import EventLogger
from stratakv.pool.auth import PoolCredentials, require_credentials
from stratakv.process import first_setup_error, started
from stratakv.settings import MetaSettings, Settings

REQUESTS_WAITING_MAX = 20_000
"""Requests that wait for PostgreSQL at once."""
TICK_S_MAX = 0.25
DRAIN_S = 5.0
"""After the signal to stop: longest wait for what is under way."""

Ready = Callable[[str], None]
"""Called with the endpoint once requests are answered."""
_log = EventLogger("meta_server")


async def serve(settings: Settings, stop: asyncio.Event, ready: Ready | None = None) -> None:
    """Run until `stop` is set. Raises SetupError if it cannot start, or if another meta server takes over the database."""
    meta = settings.meta
    credentials = PoolCredentials.from_settings(settings.pool)
    require_credentials(meta.host, "meta.host", credentials)
    if not settings.database.url:
        raise SetupError("database.url is not set", hint="set STRATAKV_DATABASE_URL to the PostgreSQL of the metadata")
    await asyncio.to_thread(migrate.check, settings.database.url)
    store = Store(migrate.driver_url(settings.database.url), settings.database)
    try:
        await store.open()
        began = time.monotonic()
        server = MetaServer(Handlers(store, await store.load(), meta, time.monotonic), meta, credentials)
        _log.info("index_rebuilt", blocks=server.num_blocks, seconds=round(time.monotonic() - began, 3))
        await server.run(Filler(store), stop, ready, store)
    except* SetupError as group:
        raise first_setup_error(group) from None
    finally:
        await store.close()


class MetaServer:
    """Socket, handlers and background tasks."""

    def __init__(self, handlers: Handlers, settings: MetaSettings, credentials: PoolCredentials | None) -> None:
        self._handlers = handlers
        self._settings = settings
        self._socket = RouterSocket(self._on_message, credentials)
        self._waiting: set[asyncio.Task[None]] = set()
        self._kvcm: KvcmServer | None = None

    @property
    def num_blocks(self) -> int:
        return self._handlers.stats(wire.GetStats()).blocks

    async def run(self, filler: Filler, stop: asyncio.Event, ready: Ready | None, store: Store) -> None:
        """Serve until `stop`, then let what is under way finish."""
        settings = self._settings
        endpoint = f"tcp://{settings.host}:{self._socket.bind(settings.host, settings.native_port)}"
        metrics = None
        if settings.metrics_port:
            metrics = HttpServer(settings.host, settings.metrics_port, "meta", port_setting="meta.metrics_port")
        try:
            if self._settings.kvcm_enabled:
                self._kvcm = await KvcmServer.open(store, self._handlers, self._settings, time.monotonic)
            async with asyncio.TaskGroup() as tasks:
                background = [
                    tasks.create_task(work()) for work in (self._handlers.journal.run, filler.run, self._tick)
                ]
                if metrics is not None:
                    tasks.create_task(metrics.run(metrics_app(self._handlers)))
                started()
                _log.info("ready", endpoint=endpoint)
                if ready is not None:
                    ready(endpoint)
                await stop.wait()
                if self._kvcm is not None:
                    await self._kvcm.close()
                await self._drain()
                for task in background:
                    task.cancel()
                if metrics is not None:
                    metrics.stop()
        finally:
            if self._kvcm is not None:
                await self._kvcm.close()
            self._socket.close()

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(DRAIN_S):
                while self._waiting:
                    await asyncio.wait(self._waiting)
                await self._handlers.journal.all_written()
        except TimeoutError:
            _log.warning("drain_cut_short", requests=len(self._waiting))

    async def _tick(self) -> None:
        while True:
            self._handlers.tick()
            if self._kvcm is not None:
                self._kvcm.tick()
            await asyncio.sleep(min(TICK_S_MAX, self._settings.heartbeat_s / 2))

    def _on_message(self, client: bytes, request_id: bytes, payload: bytes) -> None:
        def reply(message: wire.Message) -> None:
            self._socket.send(client, request_id, wire.encode(message))

        try:
            request = _decode(payload)
            answer = self._handlers.by_message[type(request)](request)
            if inspect.isawaitable(answer):
                self._answer_later(answer, reply)
            else:
                reply(answer)
        except StrataError as error:
            reply(failure_of(error))
        except Exception:
            _log.exception("request_failed")
            reply(failure_of(StrataError("internal error")))

    def _answer_later(self, answer: Awaitable[wire.Message], reply: Callable[[wire.Message], None]) -> None:
        if len(self._waiting) >= REQUESTS_WAITING_MAX:
            if inspect.iscoroutine(answer):
                answer.close()
            raise Overloaded("too many requests wait for the metadata database")
        task = asyncio.get_running_loop().create_task(_reply_when_done(answer, reply))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)


def _decode(payload: bytes) -> wire.Message:
    try:
        request: wire.Message = wire.decode_request(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"malformed request: {error}") from None
    return request


async def _reply_when_done(answer: Awaitable[wire.Message], reply: Callable[[wire.Message], None]) -> None:
    try:
        reply(await answer)
    except StrataError as error:
        reply(failure_of(error))
    except Exception:
        _log.exception("request_failed")
        reply(failure_of(StrataError("internal error")))
