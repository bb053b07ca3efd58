"""The disk tier: cold pages go there and come back bit for bit, also after kill -9 of the daemon and of the meta server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stratakv.errors import StrataError
from stratakv.keys import pack_keys
from stratakv.pool.dmp_client import TransportKind, connect
from stratakv.pool.meta_client import MetaClient
from stratakv.pool.pages import PageReader
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
    PutStart,
    ReleaseLease,
)
from tests.integration.pool.daemon import DaemonProcess
from tests.integration.pool.pages import LAYOUT, NAMESPACE, WrittenPages, empty_memory, layer_data, soon, write_pages
from tests.service_process import ServiceProcess
from tests.support import eventually_async

StartDaemon = Callable[..., DaemonProcess]
NUM_PAGES = 16
MIB = 1 << 20


@pytest.fixture
def meta_flags() -> list[str]:
    """Above 12 of 256 pages everything cold leaves memory; below, pages may come back."""
    return ["--heartbeat-s", "0.2", "--demote-high", "0.05", "--demote-low", "0"]


@pytest.fixture
def start(start_daemon: StartDaemon, meta_port: int, tmp_path: Path) -> Callable[..., DaemonProcess]:
    """A daemon with a disk, always the same directory."""

    def start_one(*flags: str) -> DaemonProcess:
        disk = ("--segment-bytes", "2MiB", "--disk-dir", str(tmp_path / "disk"), "--disk-file-bytes", "1MiB")
        return start_daemon(meta_port=meta_port, flags=(*disk, *flags))

    return start_one


async def _nodes(client: MetaClient) -> dict[str, int]:
    """Bytes in use by node."""
    try:
        return {state.segment.node: state.used_bytes for state in (await client.call(ListNodes(), Nodes)).nodes}
    except StrataError:
        return {}


async def _both_listed(client: MetaClient) -> bool:
    return {"dmp-t", "dmp-t/disk"} <= set(await _nodes(client))


async def _put(client: MetaClient, daemon: DaemonProcess, num_pages: int = NUM_PAGES, seed: int = 0) -> WrittenPages:
    await eventually_async(lambda: _both_listed(client), what="memory and disk to be listed")
    connection = connect(daemon.segment, deadline=soon())
    written = await asyncio.to_thread(write_pages, connection, num_pages, seed=seed)
    request = PutStart(written.put_id, NAMESPACE, pack_keys(written.keys), LAYOUT.page_bytes, LAYOUT.page_tokens)
    await client.call(request, PutGrant)
    await client.call(PutEnd(written.put_id, daemon.segment.epoch, written.extents), Done)
    connection.close()
    return written


async def _places(client: MetaClient, written: WrittenPages, lease_s: float = 5.0) -> Match:
    return await client.call(MatchPrefix(NAMESPACE, pack_keys(written.keys), lease_s), Match)


async def _where(client: MetaClient, written: WrittenPages) -> set[str]:
    """The nodes that hold all the pages; empty while some cannot be found. Does not count as reading."""
    try:
        if (await client.call(MatchPrefix(NAMESPACE, pack_keys(written.keys)), Match)).num_blocks < len(written.keys):
            return set()
    except StrataError:
        return set()
    nodes = await _nodes(client)
    return {node for node, used in nodes.items() if used > 0}


async def _demoted(client: MetaClient, written: WrittenPages) -> None:
    async def is_on_disk() -> bool:
        return await _where(client, written) == {"dmp-t/disk"}

    await eventually_async(is_on_disk, what="all pages on disk, and their memory free")


def _read(match: Match, written: WrittenPages) -> list[list[tuple[bytes, ...]]]:
    """All layers of pages that lie on one segment."""
    (segment,) = match.segments
    connection = connect(segment, deadline=soon())
    assert connection.kind is (TransportKind.TCP if segment.is_disk else TransportKind.SHM)
    pages = PageReader(LAYOUT, NAMESPACE).read_headers(connection, match.places(), written.keys, deadline=soon())
    assert not pages.failures
    memory, layers = empty_memory(LAYOUT, len(written.keys)), range(len(LAYOUT.layers))
    pages.read_layers(layers, memory, deadline=soon())
    connection.close()
    return [layer_data(memory, layer) for layer in layers]


async def test_cold_pages_leave_memory_and_are_read_from_disk(client: MetaClient, start: StartDaemon) -> None:
    written = await _put(client, start())
    await _demoted(client, written)
    match = await _places(client, written)
    assert {place.node for place in match.places()} == {"dmp-t/disk"}
    assert _read(match, written) == written.data


async def test_pages_on_disk_outlive_the_daemon_and_the_meta_server(
    client: MetaClient, meta_server: ServiceProcess, start: StartDaemon
) -> None:
    daemon = start()
    written = await _put(client, daemon)
    await _demoted(client, written)
    daemon.kill()
    meta_server.kill()
    meta_server.start()
    start()

    async def is_found() -> bool:
        return await _where(client, written) == {"dmp-t/disk"}

    await eventually_async(is_found, what="pages to be found again")
    assert _read(await _places(client, written), written) == written.data


async def test_a_page_damaged_while_the_daemon_was_down_is_not_advertised(
    client: MetaClient, start: StartDaemon, tmp_path: Path
) -> None:
    daemon = start()
    written = await _put(client, daemon)
    await _demoted(client, written)
    place = (await _places(client, written)).places()[5]
    daemon.kill()
    with next((tmp_path / "disk/dmp-t").glob("*.pages")).open("r+b") as file:
        file.seek((place.offset & 0xFFFF_FFFF) + 5000)
        file.write(b"\xff" * 8)
    start()

    async def is_cut() -> bool:
        try:
            return (await client.call(MatchPrefix(NAMESPACE, pack_keys(written.keys)), Match)).num_blocks == 5
        except StrataError:
            return False

    await eventually_async(is_cut, what="the pages before the damaged one to be found")


async def test_pages_that_are_read_again_come_back_to_memory(client: MetaClient, start: StartDaemon) -> None:
    written = await _put(client, start())
    await _demoted(client, written)
    hot = replace(written, keys=written.keys[:4], data=[layer[:4] for layer in written.data])
    for _ in range(2):
        match = await _places(client, hot)
        await client.call(ReleaseLease(match.lease_id), Done)

    async def is_back() -> bool:
        match = await _places(client, hot, lease_s=0.1)
        return {place.node for place in match.places()} == {"dmp-t"}

    await eventually_async(is_back, what="the pages in memory")
    assert _read(await _places(client, hot), hot) == hot.data


async def test_flushed_pages_leave_no_bytes_on_disk(client: MetaClient, start: StartDaemon, tmp_path: Path) -> None:
    written = await _put(client, start())
    await _demoted(client, written)

    async def is_empty() -> bool:
        await client.call(Flush(NAMESPACE), Flushed)
        return (await _nodes(client)).get("dmp-t/disk") == 0

    await eventually_async(is_empty, timeout_s=40, what="the disk to be empty")
    assert list((tmp_path / "disk/dmp-t").glob("*.pages")) == []


async def test_a_full_disk_gives_up_the_ends_of_prefixes_first(client: MetaClient, start: StartDaemon) -> None:
    num_pages = MIB // LAYOUT.page_bytes + NUM_PAGES
    written = await _put(client, start("--disk-bytes", "1MiB"), num_pages)

    async def is_cut() -> bool:
        match = await client.call(MatchPrefix(NAMESPACE, pack_keys(written.keys)), Match)
        return match.num_blocks < num_pages

    await eventually_async(is_cut, what="the last pages to be given up")
    nodes = [place.node for place in (await _places(client, written)).places()]
    assert num_pages * 0.8 < len(nodes) < num_pages
    assert nodes == sorted(nodes), "the beginning stays in memory"
    assert nodes[-1] == "dmp-t/disk"
