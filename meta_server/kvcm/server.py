"""The KVCM API of one meta server: loads what it knows, opens the ports, lets time pass, closes."""

from __future__ import annotations

import asyncio

from meta_server.handlers import Handlers
from meta_server.kvcm.admin_service import AdminService
from meta_server.kvcm.calls import Calls, Gate
from meta_server.kvcm.faces import Doorman, GrpcFace, HttpFace, check_reachable
from meta_server.kvcm.meta_service import MetaService
from meta_server.kvcm.metrics import Metrics
from meta_server.kvcm.protocol import admin_service_pb2 as admin
from meta_server.kvcm.protocol import meta_service_pb2 as meta
from meta_server.kvcm.state import KvcmState
from meta_server.kvcm.store import Changes, load
from meta_server.presence import Clock
from meta_server.store import CONNECTION_ERRORS, Store
from stratakv.http_server import HttpServer
from stratakv.log import EventLogger
from stratakv.process import is_loopback
from stratakv.settings import MetaSettings

HEALTH_TIMEOUT_S = 1.0
CLOSE_S_MAX = 10.0
_log = EventLogger("meta_server.kvcm")


class KvcmServer:
    """State, services and ports; made by `open`, ended by `close`."""

    def __init__(self, state: KvcmState, store: Store, handlers: Handlers, settings: MetaSettings) -> None:
        self._state = state
        self._store = store
        self._settings = settings
        self._journal = handlers.journal
        self._grpc: list[GrpcFace] = []
        self._http: list[tuple[HttpServer, asyncio.Task[None]]] = []
        metrics, gate = Metrics(), Gate()
        node_id = f"{settings.host}:{settings.native_port}"
        endpoint = meta.LeaderEndpoint(
            node_id=node_id,
            host=settings.kvcm_host,
            meta_rpc_port=settings.kvcm_grpc_port,
            meta_http_port=settings.kvcm_http_port,
        )
        meta_service = MetaService(state, handlers.own_blocks, endpoint)
        admin_service = AdminService(state, meta_service, metrics, node_id, self._is_healthy)
        self._metrics = metrics
        self._meta = Calls(meta.DESCRIPTOR.services_by_name["MetaService"], meta_service, metrics, gate)
        self._admin = Calls(admin.DESCRIPTOR.services_by_name["AdminService"], admin_service, metrics, gate)

    @classmethod
    async def open(cls, store: Store, handlers: Handlers, settings: MetaSettings, clock: Clock) -> KvcmServer:
        """Load the state and listen. Raises SetupError."""
        check_reachable(settings.kvcm_host, settings.kvcm_token, is_local=is_loopback(settings.kvcm_host))
        state = KvcmState(
            Changes(handlers.journal),
            clock,
            await load(store, clock()),
            file_root=str(settings.kvcm_file_dir.expanduser().absolute()),
            open_writes_max=settings.puts_pending_max,
        )
        server = cls(state, store, handlers, settings)
        try:
            await server._listen()
        except BaseException:
            await server.close()
            raise
        return server

    def tick(self) -> None:
        self._state.tick()

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
        await self._state.files.close()

    async def _is_healthy(self) -> bool:
        try:
            await self._store.pool.fetchval("SELECT 1", timeout=HEALTH_TIMEOUT_S)
        except CONNECTION_ERRORS:
            return False
        return self._journal.available
