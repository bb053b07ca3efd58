"""One memory-pool daemon: a segment, its listeners, its heartbeat, and its disk if it has one."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine
from functools import partial

from dmp.allocator import ExtentAllocator
from dmp.disk.mover import Mover
from dmp.disk.node import DiskNode
from dmp.disk.store import DiskStore
from dmp.drain import Drainer
from dmp.give_back import give_back_unused
from dmp.heartbeat import Heartbeat
from dmp.metrics import DaemonMetrics
from dmp.pages import read_page
from dmp.puts import PutTable
from dmp.segment import MemorySegment
from dmp.server import DaemonServer
from stratakv.errors import SetupError
from stratakv.log import EventLogger
from stratakv.pool.auth import PoolCredentials, require_credentials
from stratakv.pool.dmp_client import ConnectionCache
from stratakv.pool.fence import TermFence
from stratakv.pool.meta_client import MetaClient
from stratakv.pool.mooncake import transfer_engine
from stratakv.pool.shards import of_shard
from stratakv.process import advertised_host
from stratakv.settings import DmpSettings, Settings
from stratakv.wire import Segment

log = EventLogger("dmp")

DISK_FILE_BYTES_MIN = 1024 * 1024
NODE_CHARS_MAX = 128
"""A directory is called so."""


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run until `stop`. Raises SetupError."""
    dmp = settings.dmp
    _check_node_name(dmp.node)
    shard = of_shard(settings.meta, dmp.shard_number)
    credentials = PoolCredentials.from_settings(settings.pool)
    require_credentials(dmp.host, "dmp.host", credentials)
    public_host = advertised_host(dmp.host, dmp.public_host, "dmp")
    memory = MemorySegment(dmp.segment_bytes)
    puts = PutTable(ExtentAllocator(memory.size_bytes), time.monotonic)
    store = _open_disk(dmp)
    engine = transfer_engine(public_host, settings.pool.transfer_engine)
    if engine is not None:
        engine.register(memory.address, memory.size_bytes)
    fence, metrics = TermFence(), DaemonMetrics()
    engine_name = engine.name if engine is not None else ""
    server = DaemonServer(dmp, memory, puts, credentials, metrics, store, engine_name, fence)
    connections = ConnectionCache(credentials=credentials)
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
        disk_bytes=store.size_bytes if store is not None else 0,
    )
    try:
        client = MetaClient(shard, role="dmp", name=segment.node, credentials=credentials, fence=fence)
        async with client:
            drainer = Drainer(client, connections, metrics)
            parts = [server.accept(), _populate(memory, puts, stop), drainer.run()]
            if engine is None:
                # An adapter goes on writing to the memory that it was told of, whoever has it by then.
                parts.append(give_back_unused(memory, puts))
            on_moves = None
            if store is not None:
                disk = _disk_segment(segment, store)
                mover = Mover(client, memory, puts, store, (segment, disk), metrics)
                scrub_rate = dmp.disk_scrub_bytes_per_s
                parts.append(DiskNode(client, disk, store, mover, drainer, scrub_rate, metrics).run())
                on_moves = mover.demote
            send_away = partial(drainer.send_away, segment, partial(read_page, memory, puts))
            parts.append(Heartbeat(client, segment, puts, random.Random(), send_away, on_moves).run())
            await _until_stopped(stop, *parts)
    finally:
        connections.close()
        server.close()
        if store is not None:
            store.close()
        log.info("stopped", node=segment.node)


def _check_node_name(name: str) -> None:
    """It names a directory of the disk, too, and `<node>/disk` a segment. Raises SetupError."""
    if not 0 < len(name) <= NODE_CHARS_MAX or not name.isprintable() or "/" in name or name in (".", ".."):
        raise SetupError(f"dmp.node = {name!r}: expected 1 to {NODE_CHARS_MAX} printable characters without a slash")


def _open_disk(dmp: DmpSettings) -> DiskStore | None:
    if dmp.disk_dir is None:
        return None
    if dmp.disk_file_bytes < DISK_FILE_BYTES_MIN:
        raise SetupError(f"dmp.disk_file_bytes = {dmp.disk_file_bytes}: at least {DISK_FILE_BYTES_MIN}")
    if dmp.disk_bytes < DISK_FILE_BYTES_MIN:
        raise SetupError(f"dmp.disk_bytes = {dmp.disk_bytes}: at least {DISK_FILE_BYTES_MIN}")
    directory = dmp.disk_dir.expanduser() / dmp.node
    return DiskStore(directory, dmp.disk_bytes, dmp.disk_file_bytes, fsync=dmp.disk_fsync)


def _disk_segment(memory: Segment, store: DiskStore) -> Segment:
    return Segment(
        node=f"{memory.node}/disk",
        epoch=store.epoch,
        host=memory.host,
        port=memory.port,
        socket_name="",
        size_bytes=store.size_bytes,
        disk_of=memory.node,
    )


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


async def _populate(memory: MemorySegment, puts: PutTable, stop: asyncio.Event) -> None:
    await asyncio.to_thread(memory.populate, lambda: stop.is_set() or puts.limit_bytes > 0)
    await stop.wait()


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()
