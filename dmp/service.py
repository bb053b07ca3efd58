"""One memory-pool daemon: a segment, its listeners, and its heartbeat."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine

from dmp.allocator import ExtentAllocator
from dmp.heartbeat import Heartbeat
from dmp.puts import PutTable
from dmp.segment import MemorySegment
from dmp.server import DaemonServer
from stratakv.errors import SetupError
from stratakv.log import EventLogger
from stratakv.pool.auth import PoolCredentials, require_credentials
from stratakv.pool.meta_client import MetaClient
from stratakv.process import advertised_host
from stratakv.settings import Settings
from stratakv.wire import Segment

log = EventLogger("dmp")


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run until `stop`. Raises SetupError."""
    dmp = settings.dmp
    credentials = PoolCredentials.from_settings(settings.pool)
    require_credentials(dmp.host, "dmp.host", credentials)
    public_host = advertised_host(dmp.host, dmp.public_host, "dmp")
    memory = MemorySegment(dmp.segment_bytes)
    puts = PutTable(ExtentAllocator(memory.size_bytes), time.monotonic)
    server = DaemonServer(dmp, memory, puts, credentials)
    segment = Segment(
        node=dmp.node,
        epoch=memory.epoch,
        host=public_host,
        port=server.port,
        socket_name=memory.socket_name,
        size_bytes=memory.size_bytes,
    )
    log.info(
        "serving",
        node=segment.node,
        host=segment.host,
        port=segment.port,
        epoch=segment.epoch.hex(),
        segment_bytes=segment.size_bytes,
    )
    try:
        async with MetaClient(settings.meta, role="dmp", name=segment.node, credentials=credentials) as client:
            heartbeat = Heartbeat(client, segment, puts, random.Random())
            await _until_stopped(stop, server.accept(), heartbeat.run(), _populate(memory, stop))
    finally:
        server.close()
        log.info("stopped", node=segment.node)


async def _until_stopped(stop: asyncio.Event, *parts: Coroutine[None, None, None]) -> None:
    """Run the parts until `stop`, or until one of them fails."""
    tasks = [asyncio.create_task(part) for part in (*parts, _wait(stop))]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    except ExceptionGroup as group:
        setup = group.subgroup(SetupError)
        raise setup.exceptions[0] if setup else group from None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _populate(memory: MemorySegment, stop: asyncio.Event) -> None:
    await asyncio.to_thread(memory.populate, stop.is_set)
    await stop.wait()


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()
