"""A daemon and a real meta server: space of dead writers and dropped pages comes back, and only then (P4)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from stratakv.errors import Unavailable
from stratakv.keys import pack_keys
from stratakv.pool.dmp_client import DmpConnection, connect
from stratakv.pool.meta_client import MetaClient
from stratakv.wire import (
    Done,
    Flush,
    Flushed,
    ListNodes,
    Match,
    MatchPrefix,
    Nodes,
    PutEnd,
    PutGrant,
    PutRevoke,
    PutStart,
)
from tests.integration.pool.daemon import DaemonProcess
from tests.integration.pool.pages import LAYOUT, NAMESPACE, WrittenPages, soon, write_pages
from tests.service_process import ServiceProcess
from tests.support import eventually_async

StartDaemon = Callable[..., DaemonProcess]


async def registered(client: MetaClient, daemon: DaemonProcess) -> None:
    async def is_listed() -> bool:
        try:
            nodes = (await client.call(ListNodes(), Nodes)).nodes
        except Unavailable:
            # A server that was killed is noticed by the first call that gets no answer.
            return False
        return any(state.segment == daemon.segment for state in nodes)

    await eventually_async(is_listed, what="daemon to be listed")


async def start_put(client: MetaClient, written: WrittenPages, timeout_s: float = 30.0) -> PutGrant:
    request = PutStart(
        put_id=written.put_id,
        namespace=NAMESPACE,
        keys=pack_keys(written.keys),
        page_bytes=LAYOUT.page_bytes,
        block_size=LAYOUT.page_tokens,
        timeout_s=timeout_s,
    )
    return await client.call(request, PutGrant)


async def used(connection: DmpConnection) -> int:
    return (await asyncio.to_thread(connection.stats, deadline=soon())).used_bytes


async def commit(client: MetaClient, daemon: DaemonProcess, written: WrittenPages) -> None:
    await start_put(client, written)
    await client.call(PutEnd(written.put_id, daemon.segment.epoch, written.extents), Done)


async def test_a_committed_put_outlives_its_time_and_is_freed_when_flushed(
    client: MetaClient, meta_port: int, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(meta_port=meta_port)
    await registered(client, daemon)
    connection = connect(daemon.segment, deadline=soon())
    written = await asyncio.to_thread(write_pages, connection, 4, timeout_s=0.5)
    await commit(client, daemon, written)

    async def is_settled() -> bool:
        return (await asyncio.to_thread(connection.stats, deadline=soon())).puts_open == 0

    await eventually_async(is_settled, what="the put to be decided")
    assert await used(connection) == 4 * LAYOUT.page_bytes
    match = await client.call(MatchPrefix(NAMESPACE, pack_keys(written.keys), lease_s=0.1), Match)
    assert match.num_blocks == 4
    assert match.segments == [daemon.segment]

    async def is_flushed() -> bool:
        await client.call(Flush(NAMESPACE), Flushed)
        return await used(connection) == 0

    await eventually_async(is_flushed, timeout_s=40, what="flushed pages to be freed")
    connection.close()


async def test_the_space_of_a_writer_that_vanished_comes_back(
    client: MetaClient, meta_port: int, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(meta_port=meta_port)
    await registered(client, daemon)
    connection = connect(daemon.segment, deadline=soon())
    written = await asyncio.to_thread(write_pages, connection, 4, timeout_s=0.5)
    await start_put(client, written, timeout_s=0.5)
    assert await used(connection) == 4 * LAYOUT.page_bytes

    async def is_free() -> bool:
        return await used(connection) == 0

    await eventually_async(is_free, what="the put to expire")
    connection.close()


async def test_a_writer_that_gives_up_frees_its_space_before_its_time(
    client: MetaClient, meta_port: int, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(meta_port=meta_port)
    await registered(client, daemon)
    connection = connect(daemon.segment, deadline=soon())
    written = await asyncio.to_thread(write_pages, connection, 4, timeout_s=500.0)
    await start_put(client, written)
    await client.call(PutRevoke(written.put_id), Done)
    await asyncio.to_thread(connection.release, written.put_id, deadline=soon())

    async def is_free() -> bool:
        return await used(connection) == 0

    await eventually_async(is_free, what="the put to be freed")
    connection.close()


async def test_giving_up_after_a_commit_whose_answer_was_lost_frees_nothing(
    client: MetaClient, meta_port: int, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(meta_port=meta_port)
    await registered(client, daemon)
    connection = connect(daemon.segment, deadline=soon())
    written = await asyncio.to_thread(write_pages, connection, 4)
    await commit(client, daemon, written)
    await asyncio.to_thread(connection.release, written.put_id, deadline=soon())

    async def is_settled() -> bool:
        return (await asyncio.to_thread(connection.stats, deadline=soon())).puts_open == 0

    await eventually_async(is_settled, what="the put to be decided")
    assert await used(connection) == 4 * LAYOUT.page_bytes
    connection.close()


async def test_a_daemon_finds_its_meta_server_whenever_that_comes_back(
    client: MetaClient, meta_server: ServiceProcess, meta_port: int, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(meta_port=meta_port)
    await registered(client, daemon)
    meta_server.kill()
    connection = connect(daemon.segment, deadline=soon())
    assert await used(connection) == 0
    meta_server.start()
    await registered(client, daemon)
    connection.close()


async def test_a_daemon_whose_name_was_taken_over_ends_with_the_setting_to_change(
    client: MetaClient, meta_port: int, start_daemon: StartDaemon
) -> None:
    first = start_daemon(meta_port=meta_port)
    await registered(client, first)
    second = start_daemon(meta_port=meta_port)
    await registered(client, second)
    await asyncio.to_thread(first.process.wait, 20)
    assert first.process.returncode == 2
    assert "another daemon has registered under this name" in first.log()
    assert second.process.poll() is None
    await registered(client, second)
