"""Calls that every meta server answers, leading or standing by: who leads, how it is, let another one lead."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from meta_server.elector import Elector
from meta_server.kvcm.protocol import admin_service_pb2 as admin
from meta_server.kvcm.protocol import meta_service_pb2 as meta
from stratakv.errors import InvalidRequest
from stratakv.pool.meta_errors import NotLeader
from stratakv.settings import LogLevel

CAMPAIGN_DELAY_MS_MAX = 3_600_000


class Cluster:
    """Of MetaService and AdminService, what does not depend on who leads."""

    def __init__(self, elector: Elector, leads: Callable[[], bool], is_healthy: Callable[[], Awaitable[bool]]) -> None:
        """`leads`: whether this one answers all calls, which it does a little later than it gets its lease."""
        self._elector = elector
        self._leads = leads
        self._is_healthy = is_healthy

    def refusal(self) -> NotLeader:
        """What who stands by says to all other calls."""
        leader = self._elector.leader
        if leader.address in ("", self._elector.server.address):
            return NotLeader("this meta server does not lead, and knows of no other that does")
        where = f", gRPC {leader.kvcm_host}:{leader.kvcm_grpc_port}, HTTP {leader.kvcm_host}:{leader.kvcm_http_port}"
        return NotLeader(f"the leader is {leader.address}{where if leader.kvcm_host else ''}")

    async def get_cluster_info(self, _: meta.GetClusterInfoRequest) -> meta.GetClusterInfoResponse:
        """Where the leader's calls are answered, as far as is known."""
        leader = self._elector.leader
        return meta.GetClusterInfoResponse(
            self_node_id=self._elector.server.address,
            leader_node_id=leader.address,
            leader_endpoint=meta.LeaderEndpoint(
                node_id=leader.address,
                host=leader.kvcm_host,
                meta_rpc_port=leader.kvcm_grpc_port,
                meta_http_port=leader.kvcm_http_port,
            ),
        )

    async def check_health(self, _: admin.CheckHealthRequest) -> admin.CheckHealthResponse:
        """Healthy while PostgreSQL answers, and a leader writes."""
        return admin.CheckHealthResponse(
            is_leader=self._leads(),
            is_health=await self._is_healthy(),
            elector_last_loop_time_ms=int(self._elector.last_loop_s * 1000),
        )

    async def get_manager_cluster_info(
        self, _: admin.GetManagerClusterInfoRequest
    ) -> admin.GetManagerClusterInfoResponse:
        elector = self._elector
        now_ms = int(elector.last_loop_s * 1000)
        return admin.GetManagerClusterInfoResponse(
            info_updated_time=now_ms,
            self_leader_expiration_time=now_ms + int(elector.lease_left_s * 1000) if elector.is_leader else 0,
            self_node_id=elector.server.address,
            leader_node_id=elector.leader.address,
        )

    async def leader_demote(self, _: admin.LeaderDemoteRequest) -> admin.CommonResponse:
        """Raises NotLeader."""
        if not self._elector.term:
            raise self.refusal()
        await self._elector.demote()
        return admin.CommonResponse()

    async def get_leader_elector_config(
        self, _: admin.GetLeaderElectorConfigRequest
    ) -> admin.GetLeaderElectorConfigResponse:
        return admin.GetLeaderElectorConfigResponse(campaign_delay_time_ms=int(self._elector.campaign_delay_s * 1000))

    async def update_logger(self, request: admin.UpdateLoggerRequest) -> admin.CommonResponse:
        """What this process logs of a module, or without a name of all that have no level of their own; until its next start."""
        level = request.log_level.lower()
        if level not in set(LogLevel):
            raise InvalidRequest(f"expected one of {', '.join(LogLevel)}, got {level[:64]!r}", param="log_level")
        module = request.module_name
        if module and module not in logging.root.manager.loggerDict:
            raise InvalidRequest(f"there is no logger {module[:64]!r}, such as meta_server.kvcm", param="module_name")
        logging.getLogger(module).setLevel(level.upper())
        return admin.CommonResponse()

    async def update_leader_elector_config(
        self, request: admin.UpdateLeaderElectorConfigRequest
    ) -> admin.CommonResponse:
        """How long this meta server, demoted, lets the others try; until its next start."""
        if not 0 <= request.campaign_delay_time_ms <= CAMPAIGN_DELAY_MS_MAX:
            raise InvalidRequest(f"expected 0 to {CAMPAIGN_DELAY_MS_MAX} milliseconds", param="campaign_delay_time_ms")
        self._elector.campaign_delay_s = request.campaign_delay_time_ms / 1000
        return admin.CommonResponse()
