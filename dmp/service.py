"""One memory-pool daemon: a segment, its listeners, and its heartbeat."""

from __future__ import annotations

import asyncio
import random
import time

from stratakv.pool.meta_client import MetaClient

from dmp.allocator import ExtentAllocator
from dmp.heartbeat import Heartbeat
from dmp.puts import PutTable
from dmp.segment import MemorySegment
from dmp.server import DaemonServer
from stratakv.log import EventLogger
from stratakv.process import require_loopback
from stratakv.settings import Settings
from stratakv.wire import Segment

log = EventLogger("dmp")


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run until `stop`. Raises SetupError."""
    dmp = settings.dmp
    require_loopback(dmp.host, "dmp.host", "node authentication is not configured")
    memory = MemorySegment(dmp.segment_bytes)
    puts = PutTable(ExtentAllocator(memory.size_bytes), time.monotonic)
    server = DaemonServer(dmp, memory, puts)
    segment = Segment(
        node=dmp.node,
        epoch=memory.epoch,
        host=dmp.host,
        port=server.port,
        socket_name=memory.socket_name,
        size_bytes=memory.size_bytes,
    )
    client = MetaClient(settings.meta)
    heartbeat = Heartbeat(client, segment, puts, random.Random())
    log.info(
        "serving",
        node=segment.node,
        host=segment.host,
        port=segment.port,
        epoch=segment.epoch.hex(),
        segment_bytes=segment.size_bytes,
    )
    tasks = [asyncio.create_task(server.accept()), asyncio.create_task(heartbeat.run())]
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
    for task in (*tasks, stopped):
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    server.close()
    await client.close()
    log.info("stopped", node=segment.node)
    for result in results:
        if isinstance(result, Exception):
            raise result
