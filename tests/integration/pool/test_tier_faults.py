"""kill -9 of a daemon at every step of a write and of a move between its tiers, a frozen daemon that wakes, and a sick disk.

Whatever is found afterwards is read bit for bit (P1), nothing is found that was not committed (P2), and at rest every segment
has as many bytes in use as there are committed ones (P4).
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psycopg
import pytest

from stratakv import migrate
from stratakv.errors import StrataError
from stratakv.keys import BlockKey, pack_keys
from stratakv.pool.dmp_client import connect
from stratakv.pool.meta_client import MetaClient
from stratakv.pool.pages import PageWriter
from stratakv.postgres import EmbeddedPostgres
from stratakv.wire import (
    PUT_ID_BYTES,
    Done,
    Extent,
    GetStats,
    ListNamespaces,
    ListNodes,
    Match,
    MatchPrefix,
    Namespaces,
    Nodes,
    NodeState,
    PutEnd,
    PutGrant,
    PutStart,
    ReleaseLease,
    ReportCorrupt,
    Stats,
)
from tests.integration.pool import faulty_daemon
from tests.integration.pool.daemon import DaemonProcess
from tests.integration.pool.faulty_daemon import DiskFault
from tests.integration.pool.pages import LAYOUT, NAMESPACE, WrittenPages, memory_of, random_layers, soon
from tests.integration.pool.published import data_at, data_of, publish, read
from tests.service_process import ServiceProcess
from tests.support import eventually, eventually_async, free_port

NUM_PAGES = 16
HOT = 4
"""Pages that are read again and come back to memory."""
StartDaemon = Callable[..., DaemonProcess]


@pytest.fixture(scope="module")
def meta_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def meta_server(
    postgres: EmbeddedPostgres, meta_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    """One for all; each test has a daemon of its own."""
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE tier_faults")
    url = postgres.database_url("tier_faults")
    migrate.upgrade(url)
    env = {"STRATAKV_DATABASE_URL": url, "STRATAKV_META_NATIVE_PORT": str(meta_port)}
    flags = ["--heartbeat-s", "0.2", "--demote-high", "0.05", "--demote-low", "0"]
    service = ServiceProcess("meta_server", flags, env, tmp_path_factory.mktemp("meta") / "log")
    service.start()
    yield service
    service.kill()


@pytest.fixture
def node(request: pytest.FixtureRequest) -> str:
    """Name of the test's daemon."""
    return re.sub(r"\W+", "-", request.node.name)[:60]


@pytest.fixture
def start(start_daemon: StartDaemon, meta_port: int, node: str, tmp_path: Path) -> Callable[..., DaemonProcess]:
    """The test's daemon with its disk, always the same one; with `env` a faulty one."""

    def start_one(**env: str) -> DaemonProcess:
        disk = ["--segment-bytes", "2MiB", "--disk-dir", str(tmp_path / "disk")]
        if not env:
            return start_daemon(node=node, meta_port=meta_port, flags=disk)
        flags = [*disk, "--disk-file-bytes", "64KiB"]
        return start_daemon(node=node, meta_port=meta_port, flags=flags, module=faulty_daemon.MODULE, env=env)

    return start_one


async def _states(client: MetaClient, node: str) -> dict[str, NodeState]:
    """Of the daemon and its disk."""
    states = (await client.call(ListNodes(), Nodes)).nodes
    return {state.segment.node: state for state in states if state.segment.node.partition("/")[0] == node}


async def _listed(client: MetaClient, *nodes: str) -> None:
    async def are_listed() -> bool:
        return set(await _states(client, nodes[0])) == set(nodes)

    await eventually_async(are_listed, what=f"{nodes} to be listed")


async def _committed_bytes(client: MetaClient, nodes: Iterable[str]) -> dict[str, int]:
    namespaces = (await client.call(ListNamespaces(), Namespaces)).namespaces
    by_node = {node: size for state in namespaces for node, size in state.bytes_by_node.items()}
    return {node: by_node.get(node, 0) for node in nodes}


async def _at_rest(client: MetaClient, node: str, memory: int, disk: int | None = None) -> None:
    """Exactly so many pages are committed in the daemon's tiers, and nothing else is in use."""
    expected = {node: memory * LAYOUT.page_bytes}
    if disk is not None:
        expected[f"{node}/disk"] = disk * LAYOUT.page_bytes

    async def is_so() -> bool:
        used = {name: state.used_bytes for name, state in (await _states(client, node)).items()}
        return used == expected == await _committed_bytes(client, expected)

    await eventually_async(is_so, timeout_s=30, what=f"{memory} pages in memory, {disk} on disk, and nothing else")


async def _are_intact(client: MetaClient, written: WrittenPages, pages: range) -> None:
    """All of these are found, and are as they were written."""
    keys = [written.keys[page] for page in pages]
    match = await client.call(MatchPrefix(NAMESPACE, pack_keys(keys), 5.0), Match)
    assert match.num_blocks == len(keys)
    assert data_at(match, keys) == [data_of(written)[page] for page in pages]
    await client.call(ReleaseLease(match.lease_id), Done)


async def _halted(daemon: DaemonProcess) -> None:
    await asyncio.to_thread(eventually, lambda: "halted" in daemon.log(), what="the daemon to come to its step")


async def _found_again(client: MetaClient, start: StartDaemon, node: str, expected_pages: int) -> None:
    """The daemon, once it is missed, is there again: its memory is empty, its disk has these."""

    async def is_missed() -> bool:
        return not await _states(client, node)

    await eventually_async(is_missed, what=f"{node} to be missed")
    start()
    await _at_rest(client, node, 0, expected_pages)


@pytest.mark.parametrize(
    ("step", "num_pages"), [("torn", 0), ("written", 0), ("copied", 0), ("reported", NUM_PAGES)], ids=lambda v: str(v)
)
async def test_killed_while_pages_go_to_disk(
    client: MetaClient, start: StartDaemon, node: str, step: str, num_pages: int
) -> None:
    daemon = start(HALT_AT=f"demote:{step}")
    await _listed(client, node, f"{node}/disk")
    written = await publish(client, daemon, NUM_PAGES)
    await _halted(daemon)
    await _are_intact(client, written, range(NUM_PAGES))
    daemon.kill()
    await _found_again(client, start, node, num_pages)
    await _are_intact(client, written, range(num_pages))


@pytest.mark.parametrize(("step", "first"), [("copied", 0), ("reported", HOT)], ids=lambda v: str(v))
async def test_killed_while_pages_come_back_to_memory(
    client: MetaClient, start: StartDaemon, node: str, step: str, first: int
) -> None:
    daemon = start(HALT_AT=f"promote:{step}")
    await _listed(client, node, f"{node}/disk")
    written = await publish(client, daemon, NUM_PAGES)
    await _at_rest(client, node, 0, NUM_PAGES)
    for _ in range(2):
        await read(client, written.keys[:HOT])
    await _halted(daemon)
    await _are_intact(client, written, range(HOT))
    daemon.kill()
    await _found_again(client, start, node, NUM_PAGES - first)
    await _are_intact(client, written, range(first, NUM_PAGES))


@pytest.mark.parametrize("step", ["written", "reported"])
async def test_killed_while_a_file_is_given_up(client: MetaClient, start: StartDaemon, node: str, step: str) -> None:
    daemon = start(HALT_AT=f"compact:{step}")
    await _listed(client, node, f"{node}/disk")
    sparse = await publish(client, daemon, NUM_PAGES, seed=1)
    await _at_rest(client, node, 0, NUM_PAGES)
    full = await publish(client, daemon, NUM_PAGES, seed=2)
    await _at_rest(client, node, 0, 2 * NUM_PAGES)
    gone = 9
    match = await client.call(MatchPrefix(NAMESPACE, pack_keys(sparse.keys[:gone]), 1.0), Match)
    for key, place in zip(sparse.keys, match.places(), strict=False):
        await client.call(ReportCorrupt(NAMESPACE, key, place), Done)
    await _halted(daemon)
    await _are_intact(client, sparse, range(gone, NUM_PAGES))
    daemon.kill()
    await _found_again(client, start, node, 2 * NUM_PAGES - gone)
    await _are_intact(client, sparse, range(gone, NUM_PAGES))
    await _are_intact(client, full, range(NUM_PAGES))


async def test_killed_at_any_step_of_a_put(
    client: MetaClient, start_daemon: StartDaemon, meta_port: int, node: str
) -> None:
    daemon = start_daemon(node=node, meta_port=meta_port)
    for steps in ("", "allocate", "allocate, bytes", "allocate, bytes, headers", "allocate, bytes, headers, end"):
        await _at_rest(client, node, 0)
        put_id, keys = os.urandom(PUT_ID_BYTES), [BlockKey(os.urandom(32)) for _ in range(NUM_PAGES)]
        request = PutStart(
            put_id, NAMESPACE, pack_keys(keys), LAYOUT.page_bytes, LAYOUT.page_tokens, node, timeout_s=30.0
        )
        await client.call(request, PutGrant)
        end = PutEnd(put_id, daemon.segment.epoch, await asyncio.to_thread(_write, daemon, put_id, keys, steps))
        if "end" in steps:
            await client.call(end, Done)
        daemon.kill()
        daemon = start_daemon(node=node, meta_port=meta_port)

        async def is_registered(daemon: DaemonProcess = daemon) -> bool:
            states = await _states(client, node)
            return node in states and states[node].segment == daemon.segment

        await eventually_async(is_registered, what="the daemon's new start to be known")
        if "end" not in steps:
            with pytest.raises(StrataError):
                await client.call(end, Done)
        assert (await client.call(MatchPrefix(NAMESPACE, pack_keys(keys)), Match)).num_blocks == 0, steps
    await _at_rest(client, node, 0)


def _write(
    daemon: DaemonProcess, put_id: bytes, keys: list[BlockKey], steps: str, timeout_s: float = 30.0
) -> list[Extent]:
    """Some steps of a put; its extents, or what they would be."""
    data = random_layers(LAYOUT, len(keys), seed=3)
    extents = [Extent(i * LAYOUT.page_bytes, i + 1) for i in range(len(keys))]
    connection = connect(daemon.segment, deadline=soon())
    if "allocate" in steps:
        extents = connection.allocate(put_id, len(keys), LAYOUT.page_bytes, timeout_s, deadline=soon())
    pages = PageWriter(LAYOUT, NAMESPACE).begin(connection, put_id, extents, keys)
    if "bytes" in steps:
        pages.write_layers(range(len(data)), memory_of(LAYOUT, data), deadline=soon())
    if "headers" in steps:
        pages.write_headers(deadline=soon())
    connection.close()
    return extents


async def test_a_frozen_daemon_that_wakes_has_its_pages_and_none_of_a_put_that_is_over(
    client: MetaClient, start_daemon: StartDaemon, meta_port: int, node: str
) -> None:
    daemon = start_daemon(node=node, meta_port=meta_port)
    await _listed(client, node)
    written = await publish(client, daemon, 8)
    put_id, keys = os.urandom(PUT_ID_BYTES), [BlockKey(os.urandom(32)) for _ in range(NUM_PAGES)]
    request = PutStart(put_id, NAMESPACE, pack_keys(keys), LAYOUT.page_bytes, LAYOUT.page_tokens, node, timeout_s=1.0)
    await client.call(request, PutGrant)
    extents = await asyncio.to_thread(_write, daemon, put_id, keys, "allocate, bytes, headers", timeout_s=1.0)
    end = PutEnd(put_id, daemon.segment.epoch, extents)
    lease = await client.call(MatchPrefix(NAMESPACE, pack_keys(written.keys), 0.5), Match)
    daemon.freeze()

    async def is_gone() -> bool:
        return not await _states(client, node)

    await eventually_async(is_gone, what="the daemon to count as gone")
    assert (await client.call(MatchPrefix(NAMESPACE, pack_keys(written.keys)), Match)).num_blocks == 0
    for place, key in zip(lease.places()[:1], written.keys, strict=False):
        # What is dropped while the daemon sleeps is freed when it has woken.
        await client.call(ReportCorrupt(NAMESPACE, key, place), Done)

    async def puts_are_over() -> bool:
        return (await client.call(GetStats(), Stats)).puts_pending == 0

    await eventually_async(puts_are_over, what="the put to be void")
    daemon.thaw()
    await _at_rest(client, node, 7)
    with pytest.raises(StrataError):
        await client.call(end, Done)
    await _are_intact(client, written, range(1, 8))
    assert (await client.call(MatchPrefix(NAMESPACE, keys[0]), Match)).num_blocks == 0


@pytest.mark.parametrize("fault", list(DiskFault))
async def test_a_sick_disk_takes_no_pages_and_holds_nothing_up(
    client: MetaClient, start: StartDaemon, node: str, tmp_path: Path, fault: DiskFault
) -> None:
    sign = tmp_path / "the disk is sick"
    daemon = start(FAULT=fault, FAULT_WHILE=str(sign))
    await _listed(client, node, f"{node}/disk")
    before = await publish(client, daemon, NUM_PAGES, seed=1)
    await _at_rest(client, node, 0, NUM_PAGES)
    sign.touch()
    written = await publish(client, daemon, NUM_PAGES, seed=2)

    async def is_read_only() -> bool:
        read_only = {name: state.read_only for name, state in (await _states(client, node)).items()}
        return read_only == {node: False, f"{node}/disk": True}

    await eventually_async(is_read_only, what="the disk to be read-only")
    await _are_intact(client, written, range(NUM_PAGES))
    await _are_intact(client, before, range(1))
    more = await publish(client, daemon, NUM_PAGES, seed=3)
    await _are_intact(client, more, range(NUM_PAGES))
    sign.unlink()
    await _at_rest(client, node, 0, 3 * NUM_PAGES)
    for pages in (before, written, more):
        await _are_intact(client, pages, range(NUM_PAGES))
