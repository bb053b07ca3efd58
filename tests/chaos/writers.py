"""Writers over both APIs that record what they are told, and stop at each step of a write to let something be killed."""

from __future__ import annotations

import asyncio
import enum
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from stratakv.errors import StrataError, Unavailable
from stratakv.pool.meta_client import MetaClient
from stratakv.pool.meta_errors import PutRefused
from stratakv.wire import Done, Match, MatchPrefix, PutEnd, PutGrant, PutStart
from tests.chaos.history import History, Kind
from tests.chaos.world import Daemon, World
from tests.kvcm_clients import HttpClient
from tests.meta_process import NAMESPACE, PAGE_BYTES, new_keys

BLOCKS_MAX = 40
ABANDONED_SHARE = 0.1
"""Of the writes, so many are begun and left, or ended too late."""
SHORT_TIMEOUT_S = 1.0
TIMEOUT_S = 8.0
RETRY_S = 0.1
INSTANCE = "chaos"
_RETRIED_CODES = frozenset({"SERVER_NOT_LEADER", "SERVICE_NOT_READY"})


class Step(enum.StrEnum):
    """Of a write: when something is killed."""

    BEFORE_START = "before the start"
    STARTED = "after the start"
    ENDING = "while the end is decided"
    ENDED = "after the end"


AtStep = Callable[[str, Step], Awaitable[None]]
"""Called with the API and the step."""


@dataclass(slots=True)
class Open:
    """A write whose end nobody has confirmed or refused."""

    name: str
    end: Callable[[], Awaitable[bool]]
    """Ask once more; True if acknowledged, False if refused. Raises Unavailable."""


@dataclass
class Writers:
    """What all writers of a run share."""

    world: World
    history: History
    daemon: Daemon
    client: MetaClient
    random: random.Random
    at_step: AtStep
    lookups: dict[str, Callable[[], Awaitable[int | None]]] = field(default_factory=dict)
    """Write → how many of its blocks are found now; None if nobody answers."""
    opened: dict[str, Open] = field(default_factory=dict)
    _number: int = 0

    def new_name(self, api: str) -> str:
        self._number += 1
        return f"{api}-{self._number}"

    async def native(self) -> None:
        """Write by the native protocol until cancelled."""
        while True:
            await self.at_step("native", Step.BEFORE_START)
            try:
                await self._native_write()
            except Unavailable:
                await asyncio.sleep(RETRY_S)

    async def _native_write(self) -> None:
        is_short = self.random.random() < ABANDONED_SHARE
        started = await self.start_native(SHORT_TIMEOUT_S if is_short else TIMEOUT_S)
        if started is not None:
            await self._finish("native", started[0], is_short)

    async def start_native(self, timeout_s: float) -> tuple[Open, PutEnd] | None:
        """A put that has room and only needs to be ended; None if it got none. Raises Unavailable."""
        blocks, put_id, name = self.random.randint(1, BLOCKS_MAX), os.urandom(16), self.new_name("native")
        keys = new_keys(blocks)
        start = PutStart(put_id, NAMESPACE, keys, PAGE_BYTES, 16, timeout_s=timeout_s)
        try:
            grant = await self.client.call(start, PutGrant)
        except Unavailable:
            raise
        except StrataError:  # no daemon is known to this leader yet
            await asyncio.sleep(RETRY_S)
            return None
        assert len(grant.wanted) == blocks, "room for all was granted"
        assert grant.segment is not None
        extents = self.daemon.allocate(put_id, blocks, timeout_s, grant.term)
        if extents is None:
            return None
        self.history.add(Kind.GRANTED, name, blocks=blocks, timeout_s=timeout_s)
        end = PutEnd(put_id, grant.segment.epoch, extents)

        async def ask() -> bool:
            try:
                await self.client.call(end, Done)
            except PutRefused:
                return False
            return True

        async def look() -> int | None:
            try:
                return (await self.client.call(MatchPrefix(NAMESPACE, keys), Match)).num_blocks
            except Unavailable:
                return None

        self.lookups[name] = look
        return Open(name, ask), end

    async def kvcm(self) -> None:
        """Write by the KVCM API until cancelled."""
        while True:
            await self.at_step("kvcm", Step.BEFORE_START)
            blocks, name = self.random.randint(1, BLOCKS_MAX), self.new_name("kvcm")
            is_short = self.random.random() < ABANDONED_SHARE
            timeout_s = int(SHORT_TIMEOUT_S if is_short else TIMEOUT_S)
            keys = [str(int.from_bytes(os.urandom(8), "big", signed=True)) for _ in range(blocks)]
            fields = {"instance_id": INSTANCE, "block_keys": keys}
            try:
                started = await self.call_kvcm("StartWriteCache", **fields, write_timeout_seconds=timeout_s)
            except Unavailable:
                await asyncio.sleep(RETRY_S)
                continue
            assert started["header"]["status"]["code"] == "OK", started
            self.history.add(Kind.GRANTED, name, blocks=blocks, timeout_s=timeout_s)
            session = {"instance_id": INSTANCE, "write_session_id": started["write_session_id"]}
            self.lookups[name] = self._kvcm_lookup(fields)
            await self._finish("kvcm", Open(name, self._kvcm_end(session, blocks)), is_short)

    def _kvcm_end(self, session: dict[str, Any], blocks: int) -> Callable[[], Awaitable[bool]]:
        async def ask() -> bool:
            mask = {"bool_masks": {"values": [True] * blocks}}
            code = (await self.call_kvcm("FinishWriteCache", **session, success_blocks=mask))["header"]["status"][
                "code"
            ]
            assert code in ("OK", "INVALID_ARGUMENT"), code
            return bool(code == "OK")

        return ask

    def _kvcm_lookup(self, fields: dict[str, Any]) -> Callable[[], Awaitable[int | None]]:
        async def look() -> int | None:
            try:
                answer = await self.call_kvcm("GetCacheLocation", **fields, query_type="QT_BATCH_GET")
            except Unavailable:
                return None
            return sum(bool(location["location_specs"]) for location in answer["locations"])

        return look

    async def call_kvcm(self, name: str, /, **fields: Any) -> dict[str, Any]:
        """Of the server that leads. Raises Unavailable if none does."""
        for server in self.world.servers:
            try:
                async with asyncio.timeout(6.0 if name != "GetCacheLocation" else 1.0):
                    answer = await HttpClient(server.ports).send("meta", name, fields)
            except (aiohttp.ClientError, Unavailable, TimeoutError, OSError):
                continue
            if answer["header"]["status"]["code"] not in _RETRIED_CODES:
                return answer
        raise Unavailable("nobody leads")

    async def _finish(self, api: str, write: Open, is_short: bool) -> None:
        await self.at_step(api, Step.STARTED)
        await self.look(write.name)
        if is_short and self.random.random() < 0.5:
            self.opened[write.name] = write  # its end comes late, if at all
            return
        self.history.add(Kind.ENDING, write.name)
        ending = asyncio.create_task(self.end_once(write))
        await self.at_step(api, Step.ENDING)
        if await ending:
            await self.at_step(api, Step.ENDED)
        else:
            self.opened[write.name] = write
        await self.look(write.name)

    async def end_once(self, write: Open) -> bool:
        """Whether the end is decided now."""
        try:
            is_acknowledged = await write.end()
        except Unavailable:
            return False
        self.history.add(Kind.ENDED if is_acknowledged else Kind.REFUSED, write.name)
        self.opened.pop(write.name, None)
        return True

    async def look(self, name: str, kind: Kind = Kind.SEEN) -> int | None:
        found = await self.lookups[name]()
        if found is not None:
            self.history.add(kind, name, blocks=found)
        return found

    async def read(self) -> None:
        """Look up what was written, and end what is open, until cancelled."""
        while True:
            await asyncio.sleep(self.random.uniform(0.0, 0.05))
            if self.lookups:
                await self.look(self.random.choice(list(self.lookups)))
            if self.opened and self.random.random() < 0.2:
                write = self.opened[self.random.choice(list(self.opened))]
                self.history.add(Kind.ENDING, write.name)
                await self.end_once(write)
