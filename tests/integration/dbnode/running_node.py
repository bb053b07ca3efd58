"""A DB node (without its SQL face) in the test's own process, on a free port, over stand-in workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp
from openai import AsyncOpenAI

from dbnode.node import Node
from dbnode.scheduler.pool_view import MetaCalls
from stratakv.http_server import HttpServer
from stratakv.models import DEFAULT_MODEL, pull
from stratakv.settings import DatabaseSettings, ModelSettings, RestSettings, RouterSettings, Secret, Settings
from stratakv.text import load_tokenizer
from stratakv.wire import ListOwners, ListWorkers, Match, OwnerStates, Pinned, PinPrefix, Workers
from stratakv.worker_address import worker_url
from tests.stand_in_worker import MODEL, StandInWorker
from tests.support import eventually_async


class PoolOfBlocks:
    """A meta server's answers: so many leading blocks of anything are in the pool."""

    available = True

    def __init__(self, num_blocks: int = 0) -> None:
        self.num_blocks = num_blocks

    async def call(self, request: Any, reply_type: type[Any], timeout_s: float | None = None) -> Any:
        if isinstance(request, PinPrefix):
            return Pinned(self.num_blocks, 2**62 + 1)
        if isinstance(request, ListOwners):
            return OwnerStates([])
        return Workers([]) if isinstance(request, ListWorkers) else Match(self.num_blocks)


class RunningNode:
    """What tests talk to."""

    def __init__(self, node: Node, port: int, api_key: str | None) -> None:
        self.node = node
        self.url = f"http://127.0.0.1:{port}"
        self.http = aiohttp.ClientSession(self.url)
        self._api_key = api_key

    @cached_property
    def openai(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self._api_key or "none", max_retries=0, timeout=30)

    async def close(self) -> None:
        """The clients."""
        await self.http.close()
        if "openai" in vars(self):
            await self.openai.close()

    async def sees(self, *urls: str) -> None:
        """Wait until the node uses exactly these."""
        usable = self.node.directory.usable
        await eventually_async(lambda: {r.url for r in usable(MODEL)} == set(urls), what=f"{urls} usable")


CACHE_DIR = Path("~/.cache/stratakv").expanduser()
_tokenizer = cache(load_tokenizer)
"""The same one for all nodes: loading it takes longer than most tests."""


@asynccontextmanager
async def running_node(
    *workers: StandInWorker,
    also: tuple[str, ...] = (),
    later: tuple[str, ...] = (),
    meta: MetaCalls | None = None,
    database_url: str | None = None,
    rest: RestSettings | None = None,
    **router: Any,
) -> AsyncIterator[RunningNode]:
    """`also` are addresses of other workers that are there, `later` of some that are not waited for."""
    pull(DEFAULT_MODEL, CACHE_DIR)
    urls = (*(worker.url for worker in workers), *also)
    settings = Settings(
        model=ModelSettings(cache_dir=CACHE_DIR),
        rest=replace(rest or RestSettings(), port=0),
        router=RouterSettings(**{"workers": (*urls, *later), "refresh_s": 0.1} | router),
        database=DatabaseSettings(url=Secret(database_url) if database_url else None),
    )
    with mock.patch("dbnode.node.load_tokenizer", _tokenizer):
        node = Node(settings, meta)
    await node.tenants.load()
    server = HttpServer(settings.rest.host, settings.rest.port, "rest")
    tasks = [asyncio.create_task(node.run()), asyncio.create_task(server.run(node.rest_app()))]
    running = RunningNode(node, server.port, settings.rest.api_key)
    try:
        await running.sees(*map(worker_url, urls))
        yield running
    finally:
        await running.close()
        server.stop()
        await tasks[1]
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await node.close()
