"""The meta server's process: stands by until it leads, then rebuilds the index and answers, until it is told to stop.

Everything that depends on the database's content lives for one term (`_lead`); the ports are open all the time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from meta_server.database import Database, database_of
from meta_server.door import Door
from meta_server.elector import Elector, Server
from meta_server.fill import Filler
from meta_server.handlers import Handlers
from meta_server.kvcm.server import KvcmServer
from meta_server.metrics import metrics_app
from meta_server.store import CONNECTION_ERRORS, Store
from stratakv import migrate, wire
from stratakv.errors import SetupError
from stratakv.http_server import HttpServer
from stratakv.log import EventLogger
from stratakv.pool.auth import PoolCredentials, require_credentials
from stratakv.process import first_setup_error, reachable_host, started
from stratakv.settings import MetaSettings, Secret, Settings

TICK_S_MAX = 0.25
DRAIN_S = 5.0
"""After the signal to stop: longest wait for what is under way."""
LEADER_LEASE_S_MIN = 0.5

Ready = Callable[[str], None]
"""Called with the endpoint once requests are answered, be it by saying who leads."""
_log = EventLogger("meta_server")


async def serve(settings: Settings, stop: asyncio.Event, ready: Ready | None = None) -> None:
    """Run until `stop` is set. Raises SetupError if it cannot start."""
    meta = settings.meta
    credentials = PoolCredentials.from_settings(settings.pool)
    require_credentials(meta.host, "meta.host", credentials)
    if meta.leader_lease_s < LEADER_LEASE_S_MIN:
        raise SetupError(f"meta.leader_lease_s = {meta.leader_lease_s}: at least {LEADER_LEASE_S_MIN}")
    if meta.debug_service and not meta.kvcm_enabled:
        raise SetupError("meta.debug_service is a part of the KVCM API", hint="set meta.kvcm_enabled, too")
    with database_of(settings) as database:
        await asyncio.to_thread(migrate.check, database.url)
        await _serve(
            replace(settings, database=replace(settings.database, url=Secret(database.url))), database, stop, ready
        )


async def _serve(settings: Settings, database: Database, stop: asyncio.Event, ready: Ready | None) -> None:
    door = Door(settings.meta, PoolCredentials.from_settings(settings.pool))
    try:
        async with asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(database.keep())
            await MetaServer(settings, door, ready).run(stop)
            keeping.cancel()
    except* SetupError as group:
        raise first_setup_error(group) from None
    finally:
        door.close()


class MetaServer:
    """One process: its door, its part in the election, and the KVCM API if that is enabled."""

    def __init__(self, settings: Settings, door: Door, ready: Ready | None) -> None:
        meta = settings.meta
        assert settings.database.url is not None
        self._settings = settings
        self._url = migrate.driver_url(settings.database.url)
        self._door = door
        self._ready = ready
        self._endpoint = f"tcp://{meta.host}:{door.port}"
        address = f"{meta.public_host or reachable_host(meta.host)}:{door.port}"
        self._elector = Elector(self._url, settings.database, _server(address, meta), meta.leader_lease_s)
        self._handlers: Handlers | None = None
        self._kvcm = KvcmServer(meta, self._url, self._elector, door.call_times) if meta.kvcm_enabled else None
        self._metrics: HttpServer | None = None
        if meta.metrics_port:
            self._metrics = HttpServer(meta.host, meta.metrics_port, "meta", port_setting="meta.metrics_port")

    async def run(self, stop: asyncio.Event) -> None:
        """Lead and stand by in turn until `stop`. Raises SetupError."""
        try:
            await self._elector.open()
            if self._kvcm is not None:
                await self._kvcm.listen()
            self._door.open(self._elector)
            async with asyncio.TaskGroup() as tasks:
                stopping = tasks.create_task(stop.wait())
                if self._metrics is not None:
                    app = metrics_app(self._elector, lambda: self._handlers, self._door.call_times)
                    tasks.create_task(self._metrics.run(app))
                while not stop.is_set():
                    campaign = tasks.create_task(self._elector.campaign(self._stands_by))
                    await asyncio.wait((campaign, stopping), return_when=asyncio.FIRST_COMPLETED)
                    if campaign.done():
                        await self._lead(campaign.result(), stopping)
                    campaign.cancel()
                if self._metrics is not None:
                    self._metrics.stop()
        finally:
            if self._kvcm is not None:
                await self._kvcm.close()
            await self._elector.close()

    async def _lead(self, term: int, stopping: asyncio.Task[bool]) -> None:
        """Until the lease is lost or it is time to stop."""
        keeping = asyncio.create_task(self._elector.keep())
        store = Store(self._url, self._settings.database, term, self._elector.lose)
        try:
            handlers = await self._rebuilt(store)
            await self._answer(store, handlers, keeping, stopping)
        except (SetupError, *CONNECTION_ERRORS) as error:
            # The database was there just now; it is asked again in the next campaign.
            _log.warning("leading_failed", error=type(error).__name__, detail=str(error))
        finally:
            self._handlers = None
            self._door.stand_by()
            if self._kvcm is not None:
                await self._kvcm.stand_by()
            await store.close()
            await self._elector.give_up()
            await keeping

    async def _rebuilt(self, store: Store) -> Handlers:
        """The state as of the beginning of the term. Raises SetupError, CONNECTION_ERRORS."""
        began = time.monotonic()
        await store.open()
        snapshot = await store.load()
        # On a thread, since the lease must be renewed meanwhile.
        handlers = await asyncio.to_thread(Handlers, store, snapshot, self._settings.meta, time.monotonic)
        handlers.term = self._elector.term
        blocks = handlers.stats(wire.GetStats()).blocks
        _log.info("index_rebuilt", blocks=blocks, seconds=round(time.monotonic() - began, 3))
        return handlers

    async def _answer(
        self, store: Store, handlers: Handlers, keeping: asyncio.Task[None], stopping: asyncio.Task[bool]
    ) -> None:
        if self._kvcm is not None:
            await self._kvcm.lead(store, handlers)
        async with asyncio.TaskGroup() as tasks:
            work = (handlers.journal.run, Filler(store).run, lambda: self._tick(handlers))
            background = [tasks.create_task(run()) for run in work]
            self._handlers = handlers
            self._door.lead(handlers)
            started()
            _log.info("ready", endpoint=self._endpoint, term=self._elector.term)
            self._say_ready()
            ends = [*background, keeping, stopping]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not keeping.done():
                await self._drain(handlers)
            for task in background:
                task.cancel()

    async def _drain(self, handlers: Handlers) -> None:
        """Let what is under way finish."""
        if self._kvcm is not None:
            await self._kvcm.close()
        try:
            async with asyncio.timeout(DRAIN_S):
                await self._door.answered()
                await handlers.journal.all_written()
        except TimeoutError:
            _log.warning("drain_cut_short")

    async def _tick(self, handlers: Handlers) -> None:
        while True:
            handlers.tick()
            if self._kvcm is not None:
                self._kvcm.tick()
            await asyncio.sleep(min(TICK_S_MAX, self._settings.meta.heartbeat_s / 2))

    def _stands_by(self) -> None:
        _log.info("standing_by", endpoint=self._endpoint, leader=self._elector.leader.address)
        self._say_ready()

    def _say_ready(self) -> None:
        ready, self._ready = self._ready, None
        if ready is not None:
            ready(self._endpoint)


def _server(address: str, meta: MetaSettings) -> Server:
    if not meta.kvcm_enabled:
        return Server(address)
    return Server(address, reachable_host(meta.kvcm_host), meta.kvcm_grpc_port, meta.kvcm_http_port)
