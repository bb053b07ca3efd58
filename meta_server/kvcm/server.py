"""The KVCM API of one meta server: opens the ports, loads what it knows when it leads, lets time pass, closes."""

from __future__ import annotations

import asyncio
import time

from google.protobuf.descriptor import ServiceDescriptor

from meta_server.call_times import CallTimes
from meta_server.elector import Elector
from meta_server.handlers import Handlers
from meta_server.journal import Journal
from meta_server.kvcm.accounts import Account, Accounts
from meta_server.kvcm.admin_service import AdminService
from meta_server.kvcm.calls import Calls, Gate
from meta_server.kvcm.cluster import Cluster
from meta_server.kvcm.doorman import Door, Doorman, check_reachable
from meta_server.kvcm.event_streams import EventCalls, EventStreams
from meta_server.kvcm.faces import GrpcFace, HttpFace
from meta_server.kvcm.faults import DebugService, Faults
from meta_server.kvcm.meta_service import MetaService
from meta_server.kvcm.metrics import Metrics
from meta_server.kvcm.operator_service import OperatorService
from meta_server.kvcm.protocol import admin_service_pb2 as admin
from meta_server.kvcm.protocol import debug_service_pb2 as debug
from meta_server.kvcm.protocol import event_service_pb2 as events
from meta_server.kvcm.protocol import meta_service_pb2 as meta
from meta_server.kvcm.protocol import operator_service_pb2 as operator
from meta_server.kvcm.reported import Reports
from meta_server.kvcm.state import KvcmState
from meta_server.kvcm.store import Changes, load, read_accounts
from meta_server.store import CONNECTION_ERRORS, Store
from stratakv.http_server import HttpServer
from stratakv.log import EventLogger
from stratakv.pool.meta_errors import NotLeader
from stratakv.settings import MetaSettings
from stratakv.tls_files import TlsFiles

HEALTH_TIMEOUT_S = 1.0
CLOSE_S_MAX = 10.0
_log = EventLogger("meta_server.kvcm")


class KvcmServer:
    """The ports, open from `listen` to `close`, and for each term as leader the state and the services behind them."""

    def __init__(self, settings: MetaSettings, database_url: str, elector: Elector, native: CallTimes) -> None:
        """`native`: of the other protocol's calls."""
        self._database_url = database_url
        self._settings = settings
        self._elector = elector
        self._state: KvcmState | None = None
        self._accounts = Accounts(has_token=bool(settings.kvcm_token))
        self._doorman = Doorman(settings.kvcm_token, self._accounts, self._read_accounts)
        self._doors = {"kvcm": Door(self._doorman, admin.ROLE_USER), "admin": Door(self._doorman, admin.ROLE_ADMIN)}
        self._store: Store | None = None
        self._journal: Journal | None = None
        self._reports: Reports | None = None
        self._grpc: list[GrpcFace] = []
        self._http: list[tuple[HttpServer, asyncio.Task[None]]] = []
        self._metrics, self._gate, self._faults = Metrics(native, slow_s=settings.slow_call_s), Gate(), Faults()
        self._cluster = Cluster(elector, self._leads, self._is_healthy)
        self._meta = self._calls(meta.DESCRIPTOR.services_by_name["MetaService"], self._cluster)
        self._admin = self._calls(admin.DESCRIPTOR.services_by_name["AdminService"], self._cluster)
        self._events = self._calls(events.DESCRIPTOR.services_by_name["EventService"], None)
        self._operator = self._calls(operator.DESCRIPTOR.services_by_name["OperatorService"], None)
        self._streams = EventStreams()
        for calls in self._led:
            calls.stand_by(self._cluster.refusal)

    async def listen(self) -> None:
        """Open the ports. Raises SetupError."""
        check_reachable(self._settings)
        tls = TlsFiles.load(self._settings.kvcm_tls_cert, self._settings.kvcm_tls_key, "meta.kvcm_tls")
        try:
            await self._listen(tls)
        except BaseException:
            await self.close()
            raise

    async def lead(self, store: Store, handlers: Handlers) -> None:
        """Load what is registered and written, and answer everything."""
        loaded = await load(store, time.monotonic())
        # On a thread, since the lease must be renewed meanwhile.
        state = await asyncio.to_thread(
            KvcmState,
            Changes(handlers.journal),
            time.monotonic,
            loaded,
            open_writes_max=self._settings.puts_pending_max,
            probe_s=self._settings.kvcm_probe_s,
        )
        state.add_defaults(str(self._settings.kvcm_file_dir.expanduser().absolute()))
        self._state, self._store, self._journal = state, store, handlers.journal
        self._reports = Reports(
            time.monotonic,
            silence_s=self._settings.kvcm_host_timeout_s,
            blocks_max=self._settings.kvcm_reported_blocks_max,
        )
        meta_service = MetaService(state, handlers.own_blocks, self._reports)
        self._meta.lead(meta_service, self._refusal)
        self._accounts.replace(loaded.accounts)
        self._admin.lead(
            AdminService(state, meta_service, self._metrics, self._reports.forget, self._accounts, self._doorman),
            self._refusal,
        )
        self._operator.lead(OperatorService(state), self._refusal)
        self._events.lead(EventCalls(handlers), self._refusal)
        self._streams.lead(handlers)

    async def stand_by(self) -> None:
        """The term is over. Safe to repeat."""
        for calls in self._led:
            calls.stand_by(self._cluster.refusal)
        self._streams.stand_by()
        state, self._state, self._store, self._journal, self._reports = self._state, None, None, None, None
        if state is not None:
            await state.files.close()

    def tick(self) -> None:
        if self._state is not None:
            self._state.tick()
        if self._reports is not None:
            self._reports.tick()

    @property
    def _led(self) -> tuple[Calls, ...]:
        """Services that the leader answers."""
        return self._meta, self._admin, self._operator, self._events

    def _leads(self) -> bool:
        return self._state is not None and self._elector.is_leader

    def _calls(self, service: ServiceDescriptor, cluster: object) -> Calls:
        return Calls(service, cluster, self._metrics, self._gate, self._faults)

    def _admin_services(self) -> tuple[Calls, ...]:
        if not self._settings.debug_service:
            return self._admin, self._operator
        service = DebugService(self._faults, [*self._meta.by_name, *self._admin.by_name])
        return self._admin, self._operator, self._calls(debug.DESCRIPTOR.services_by_name["DebugService"], service)

    def _refusal(self) -> NotLeader | None:
        return None if self._elector.may_answer else self._cluster.refusal()

    async def _read_accounts(self) -> list[Account] | None:
        """Raises CONNECTION_ERRORS. The leader knows them all."""
        return None if self._state is not None else await read_accounts(self._database_url)

    async def _listen(self, tls: TlsFiles | None) -> None:
        """All ports are bound before the first HTTP server runs, so that a taken one leaves nothing to end."""
        settings = self._settings
        ports = {"kvcm": ((self._meta, self._events), self._streams), "admin": (self._admin_services(), None)}
        for name, (services, streams) in ports.items():
            if port := getattr(settings, f"{name}_grpc_port"):
                face = GrpcFace(services, self._doors[name], streams)
                face.bind(settings.kvcm_host, port, f"meta.{name}_grpc_port", tls)
                await face.start()
                self._grpc.append(face)
        servers = []
        for name, (services, streams) in ports.items():
            if port := getattr(settings, f"{name}_http_port"):
                server = HttpServer(settings.kvcm_host, port, "meta", port_setting=f"meta.{name}_http_port", tls=tls)
                servers.append((server, HttpFace(services, self._doors[name], self._metrics.registry, streams)))
        self._http = [(server, asyncio.create_task(server.run(app))) for server, app in servers]
        _log.info("listening", host=settings.kvcm_host, tls=tls is not None)

    async def close(self) -> None:
        """Answer what is under way, and no more. Safe to repeat."""
        self._streams.stand_by()
        self._doorman.close()
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
