"""A host takes memory back from a running daemon, and the pages that stay are whole."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from stratakv.pool.dmp_client import TransportKind, connect
from stratakv.pool.meta_client import MetaClient
from tests.integration.pool.command import stratakv
from tests.integration.pool.daemon import MIB, DaemonProcess
from tests.integration.pool.pages import soon
from tests.integration.pool.published import data_at, data_of, listed, publish, read
from tests.support import eventually_async

StartDaemon = Callable[..., DaemonProcess]
PAGES = 20


def _memory_bytes(daemon: DaemonProcess) -> int:
    """What the segment takes of the host."""
    fds = Path(f"/proc/{daemon.process.pid}/fd")
    memory, *_ = (fd for fd in fds.iterdir() if "memfd:stratakv-dmp" in str(fd.readlink()))
    return os.stat(memory).st_blocks * 512


async def test_the_host_gets_the_memory_beyond_a_limit_back_until_the_limit_ends(
    client: MetaClient, start_daemon: StartDaemon, meta_port: int, tmp_path: Path
) -> None:
    daemon = start_daemon(meta_port=meta_port, flags=("--segment-bytes", "64MiB"))
    await listed(client, "dmp-t")
    written = await publish(client, daemon, PAGES)
    await eventually_async(lambda: _memory_bytes(daemon) == 64 * MIB, what="all memory to be brought in")
    assert (await stratakv(meta_port, tmp_path, "cache", "resize", "dmp-t", "4MiB")).status == 0
    await eventually_async(lambda: _memory_bytes(daemon) <= 4 * MIB, what="memory to be given back")
    match = await read(client, written.keys)
    assert await asyncio.to_thread(data_at, match, written.keys) == data_of(written)
    neighbour = connect(daemon.segment, deadline=soon(), force=TransportKind.SHM)
    assert "limited to 4.0 MiB" in (await stratakv(meta_port, tmp_path, "cache", "stats")).out
    assert _memory_bytes(daemon) <= 4 * MIB, "who comes later does not bring it all in again"
    neighbour.close()
    assert (await stratakv(meta_port, tmp_path, "cache", "resize", "dmp-t", "full")).status == 0
    more = await publish(client, daemon, 600)
    match = await read(client, more.keys)
    assert await asyncio.to_thread(data_at, match, more.keys) == data_of(more)
    assert (await stratakv(meta_port, tmp_path, "cache", "resize", "dmp-t", "65MiB")).status == 1
