"""The KVCM API of one meta server: opens the ports, loads what it knows when it leads, lets time pass, closes."""

from __future__ import annotations

import asyncio
import time

from meta_server.elector import Elector
from meta_server.handlers import Handlers
from meta_server.journal import Journal
from meta_server.kvcm.admin_service import AdminService
from meta_server.kvcm.calls import Calls, Gate
from meta_server.kvcm.cluster import Cluster
from meta_server.kvcm.faces import Doorman, GrpcFace, HttpFace, check_reachable
from meta_server.kvcm.meta_service import MetaService
from meta_server.kvcm.metrics import Metrics
from meta_server.kvcm.protocol import admin_service_pb2 as admin
from meta_server.kvcm.protocol import meta_service_pb2 as meta
from meta_server.kvcm.state import KvcmState
from meta_server.kvcm.store import Changes, load
from meta_server.store import CONNECTION_ERRORS, Store
from stratakv.http_server import HttpServer
from stratakv.log import EventLogger
from stratakv.pool.meta_errors import NotLeader
from stratakv.process import is_loopback
from stratakv.settings import MetaSettings

HEALTH_TIMEOUT_S = 1.0
CLOSE_S_MAX = 10.0
_log = EventLogger("meta_server.kvcm")


class KvcmServer:
    """The ports, open from `listen` to `close`, and for each term as leader the state and the services behind them."""

    def __init__(self, settings: MetaSettings, elector: Elector) -> None:
        self._settings = settings
        self._elector = elector
        self._state: KvcmState | None = None
        self._store: Store | None = None
        self._journal: Journal | None = None
        self._grpc: list[GrpcFace] = []
        self._http: list[tuple[HttpServer, asyncio.Task[None]]] = []
        self._metrics, gate = Metrics(), Gate()
        self._cluster = Cluster(elector, self._is_healthy)
        services = meta.DESCRIPTOR.services_by_name["MetaService"], admin.DESCRIPTOR.services_by_name["AdminService"]
        self._meta, self._admin = (Calls(service, self._cluster, self._metrics, gate) for service in services)
        for calls in (self._meta, self._admin):
            calls.stand_by(self._cluster.refusal)

    async def listen(self) -> None:
        """Open the ports. Raises SetupError."""
        check_reachable(
            self._settings.kvcm_host, self._settings.kvcm_token, is_local=is_loopback(self._settings.kvcm_host)
        )
        try:
            await self._listen()
        except BaseException:
            await self.close()
            raise

    async def lead(self, store: Store, handlers: Handlers) -> None:
        """Load what is registered and written, and answer everything."""
        state = KvcmState(
            Changes(handlers.journal),
            time.monotonic,
            await load(store, time.monotonic()),
            file_root=str(self._settings.kvcm_file_dir.expanduser().absolute()),
            open_writes_max=self._settings.puts_pending_max,
        )
        self._state, self._store, self._journal = state, store, handlers.journal
        meta_service = MetaService(state, handlers.own_blocks)
        self._meta.lead(meta_service, self._refusal)
        self._admin.lead(AdminService(state, meta_service, self._metrics), self._refusal)

    async def stand_by(self) -> None:
        """The term is over. Safe to repeat."""
        for calls in (self._meta, self._admin):
            calls.stand_by(self._cluster.refusal)
        state, self._state, self._store, self._journal = self._state, None, None, None
        if state is not None:
            await state.files.close()

    def tick(self) -> None:
        if self._state is not None:
            self._state.tick()

    def _refusal(self) -> NotLeader | None:
        return None if self._elector.may_answer else self._cluster.refusal()

    async def _listen(self) -> None:
        """All ports are bound before the first HTTP server runs, so that a taken one leaves nothing to end."""
        settings, doorman = self._settings, Doorman(self._settings.kvcm_token)
        for calls, name in ((self._meta, "kvcm"), (self._admin, "admin")):
            if port := getattr(settings, f"{name}_grpc_port"):
                face = GrpcFace(calls, doorman)
                face.bind(settings.kvcm_host, port, f"meta.{name}_grpc_port")
                await face.start()
                self._grpc.append(face)
        servers = []
        for calls, name in ((self._meta, "kvcm"), (self._admin, "admin")):
            if port := getattr(settings, f"{name}_http_port"):
                server = HttpServer(settings.kvcm_host, port, "meta", port_setting=f"meta.{name}_http_port")
                servers.append((server, HttpFace(calls, doorman, self._metrics.registry)))
        self._http = [(server, asyncio.create_task(server.run(app))) for server, app in servers]
        _log.info("listening", host=settings.kvcm_host)

    async def close(self) -> None:
        """Answer what is under way, and no more. Safe to repeat."""
        grpc_faces, self._grpc = self._grpc, []
        http_faces, self._http = self._http, []
        for server, _ in http_faces:
            server.stop()
        await asyncio.gather(*(face.stop() for face in grpc_faces))
        if tasks := [task for _, task in http_faces]:
            for late in (await asyncio.wait(tasks, timeout=CLOSE_S_MAX))[1]:
                late.cancel()

    async def _is_healthy(self) -> bool:
        if self._store is None or self._journal is None:
            return time.time() - self._elector.last_loop_s < self._elector.lease_s
        try:
            await self._store.pool.fetchval("SELECT 1", timeout=HEALTH_TIMEOUT_S)
        except CONNECTION_ERRORS:
            return False
        return self._journal.available
