"""Asks each meta server that the settings name who leads, or one of them to lead no more. Used by the command line."""

from __future__ import annotations

import asyncio

from stratakv.errors import StrataError
from stratakv.pool.auth import PoolCredentials
from stratakv.pool.meta_client import meta_endpoints
from stratakv.pool.meta_link import MetaLink
from stratakv.pool.shards import all_shards
from stratakv.settings import MetaSettings
from stratakv.wire import DemoteLeader, Done, GetLeader, LeaderState


async def leader_states(settings: MetaSettings, credentials: PoolCredentials | None) -> dict[str, LeaderState | None]:
    """host:port → what that server says; None if it does not answer."""
    endpoints = [endpoint for shard in all_shards(settings) for endpoint in meta_endpoints(shard)]
    states = await asyncio.gather(*(_ask(endpoint, settings.request_timeout_s, credentials) for endpoint in endpoints))
    return {endpoint.removeprefix("tcp://"): state for endpoint, state in zip(endpoints, states, strict=True)}


async def demote(settings: MetaSettings, address: str, credentials: PoolCredentials | None) -> None:
    """Have this one give up its lease. Raises NotLeader, Unavailable."""
    link = MetaLink(f"tcp://{address}", credentials)
    try:
        await link.exchange(DemoteLeader(), Done, settings.request_timeout_s)
    finally:
        link.close("asked")


async def _ask(endpoint: str, timeout_s: float, credentials: PoolCredentials | None) -> LeaderState | None:
    link = MetaLink(endpoint, credentials)
    try:
        return await link.exchange(GetLeader(), LeaderState, timeout_s)
    except StrataError:
        return None  # silence, or another protocol: either way it is of no use
    finally:
        link.close("asked")
