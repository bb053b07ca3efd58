"""Namespaces spread over several leaders: each shard has meta servers, a database and daemons of its own.

A namespace's shard follows from its name and the number of shards. Whoever works in one namespace (a worker) talks to its shard
only (`of_namespace`); a daemon belongs to one shard (`of_shard`); a DB node and the command line talk to all (`pool_client`).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import msgspec

from stratakv import wire
from stratakv.errors import InvalidRequest, SetupError
from stratakv.pool.auth import PoolCredentials
from stratakv.pool.meta_client import MetaClient
from stratakv.settings import MetaSettings

BETWEEN_SERVERS = "+"


class PoolClient(Protocol):
    """What `MetaClient` and `ShardedClient` have in common."""

    @property
    def available(self) -> bool: ...

    async def call(
        self, request: wire.Message, reply_type: type[wire.ReplyT], timeout_s: float | None = None
    ) -> wire.ReplyT: ...

    async def close(self) -> None: ...


def shard_of(namespace: bytes, num_shards: int) -> int:
    """The shard whose hash with the name is highest: of one shard more, only those move that go to it."""
    return max(range(num_shards), key=lambda shard: hashlib.sha256(shard.to_bytes(4, "big") + namespace).digest())


def of_shard(settings: MetaSettings, shard: int, setting: str = "dmp.shard_number") -> MetaSettings:
    """The settings of a client of one shard; as they are where there are none. Raises SetupError."""
    if not settings.shards and shard == 0:
        return settings
    if not 0 <= shard < len(settings.shards):
        raise SetupError(f"{setting} = {shard}, but meta.shards names {len(settings.shards)} shards")
    return replace(settings, addresses=tuple(settings.shards[shard].split(BETWEEN_SERVERS)), shards=())


def of_namespace(settings: MetaSettings, namespace: bytes) -> MetaSettings:
    """The settings of a client of a namespace's shard; as they are where there are no shards."""
    return of_shard(settings, shard_of(namespace, len(settings.shards))) if settings.shards else settings


def all_shards(settings: MetaSettings) -> list[MetaSettings]:
    """The settings of a client of each shard."""
    return [of_shard(settings, shard) for shard in range(len(settings.shards))] or [settings]


def pool_client(
    settings: MetaSettings, *, role: str = "client", name: str = "", credentials: PoolCredentials | None = None
) -> MetaClient | ShardedClient:
    """A client of the whole pool."""
    clients = [MetaClient(shard, role=role, name=name, credentials=credentials) for shard in all_shards(settings)]
    return clients[0] if len(clients) == 1 else ShardedClient(clients)


class ShardedClient:
    """One client per shard: what names a namespace goes to its shard, what lists something is asked of all of them."""

    def __init__(self, shards: Sequence[MetaClient]) -> None:
        self._shards = shards

    async def __aenter__(self) -> ShardedClient:
        await asyncio.gather(*(shard.start() for shard in self._shards))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def available(self) -> bool:
        """Whether any shard answers; the namespaces of the others are as if nothing were in the pool."""
        return any(shard.available for shard in self._shards)

    async def close(self) -> None:
        await asyncio.gather(*(shard.close() for shard in self._shards))

    async def call(
        self, request: wire.Message, reply_type: type[wire.ReplyT], timeout_s: float | None = None
    ) -> wire.ReplyT:
        """As `MetaClient.call`. Raises InvalidRequest for what concerns one node that no shard has."""
        rule = getattr(request, "rule", None)
        namespace = getattr(request, "namespace", None) or getattr(rule, "namespace", None)
        if isinstance(namespace, bytes) and namespace:
            shard = self._shards[shard_of(namespace, len(self._shards))]
            return await shard.call(request, reply_type, timeout_s)
        if hasattr(request, "node"):
            return await self._call_until_known(request, reply_type, timeout_s)
        replies = await asyncio.gather(*(shard.call(request, reply_type, timeout_s) for shard in self._shards))
        return _together(replies)

    async def _call_until_known(
        self, request: wire.Message, reply_type: type[wire.ReplyT], timeout_s: float | None
    ) -> wire.ReplyT:
        for shard in self._shards[:-1]:
            try:
                return await shard.call(request, reply_type, timeout_s)
            except InvalidRequest:
                continue  # it has no such node
        return await self._shards[-1].call(request, reply_type, timeout_s)


def _together(replies: Sequence[wire.ReplyT]) -> wire.ReplyT:
    """Lists one after another, counts added up, the longest of times; of anything else the first."""
    first = replies[0]
    changes: dict[str, Any] = {}
    for name in first.__struct_fields__:
        values = [getattr(reply, name) for reply in replies]
        if isinstance(values[0], list):
            changes[name] = [item for value in values for item in value]
        elif isinstance(values[0], float):
            changes[name] = max(values)
        elif isinstance(values[0], int) and not isinstance(values[0], bool):
            changes[name] = sum(values)
    return msgspec.structs.replace(first, **changes)
