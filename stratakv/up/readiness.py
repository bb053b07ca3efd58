"""Asks a service whether it is ready, the way its clients would reach it."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import aiohttp

from stratakv.errors import StrataError
from stratakv.pool.auth import PoolCredentials
from stratakv.pool.meta_client import MetaClient
from stratakv.process import reachable_host
from stratakv.settings import RestSettings, Settings
from stratakv.up.plan import Kind, ServiceSpec
from stratakv.wire import PROTOCOL_VERSION, Hello, ListNodes, Nodes, Welcome

PROBE_TIMEOUT_S = 2.0


def authorization(settings: RestSettings) -> dict[str, str]:
    """The headers by which the DB node's REST API knows us; it guards everything but /health."""
    return {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}


class Readiness:
    """One HTTP session and one client of the meta server, for as long as it is entered."""

    def __init__(self, settings: Settings) -> None:
        self._meta_settings = replace(settings.meta, host=reachable_host(settings.meta.host))
        self._credentials = PoolCredentials.from_settings(settings.pool)
        self._headers = authorization(settings.rest)

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S), headers=self._headers)
        self._meta = MetaClient(self._meta_settings, credentials=self._credentials)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()
        await self._meta.close()

    async def is_ready(self, spec: ServiceSpec) -> bool:
        """Whether the service does its work; False also if it does not answer."""
        try:
            if spec.kind is Kind.META:
                await self._meta.call(Hello(PROTOCOL_VERSION, "up", "stratakv-up"), Welcome)
                return True
            if spec.kind is Kind.DAEMON:
                nodes = await self._meta.call(ListNodes(), Nodes)
                return any(state.segment.node == spec.name for state in nodes.nodes)
            async with self._http.get(f"{spec.url}/ready") as response:
                return response.status == 200
        except (StrataError, aiohttp.ClientError, TimeoutError):
            return False
