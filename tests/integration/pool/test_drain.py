"""Draining real daemons: what was read is found elsewhere, bit for bit; whoever dies in the middle costs cache entries only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from stratakv.pool.meta_client import MetaClient
from stratakv.wire import DrainProgress, GetStats, ListNodes, Match, MatchPrefix, Nodes, SetDraining, Stats
from tests.integration.pool.command import stratakv
from tests.integration.pool.daemon import DaemonProcess
from tests.integration.pool.pages import NAMESPACE, WrittenPages
from tests.integration.pool.published import data_at, data_of, listed, publish, read
from tests.support import eventually_async

StartDaemon = Callable[..., DaemonProcess]
PAGES = 24


@pytest.fixture
def source(start_daemon: StartDaemon, meta_port: int) -> DaemonProcess:
    return start_daemon(node="a", meta_port=meta_port)


@pytest.fixture
def target(start_daemon: StartDaemon, meta_port: int) -> DaemonProcess:
    return start_daemon(node="b", meta_port=meta_port)


async def _found_bit_exact(client: MetaClient, written: WrittenPages) -> dict[str, int]:
    """Pages by node, each looked for by itself and compared with what was written."""
    matches = await asyncio.gather(*(client.call(MatchPrefix(NAMESPACE, key, 20.0), Match) for key in written.keys))
    found = [i for i, match in enumerate(matches) if match.num_blocks]
    places = [matches[i].places()[0] for i in found]
    segments = {segment.node: segment for i in found for segment in matches[i].segments}
    keys, expected = [written.keys[i] for i in found], data_of(written)
    whole = Match.of(places, list(segments.values()))
    assert await asyncio.to_thread(data_at, whole, keys) == [expected[i] for i in found]
    nodes = [place.node for place in places]
    return {node: nodes.count(node) for node in set(nodes)}


async def test_a_drained_daemon_is_stopped_and_every_page_that_was_read_is_found_elsewhere(
    client: MetaClient, source: DaemonProcess, target: DaemonProcess, meta_port: int, tmp_path: Path
) -> None:
    await listed(client, "a", "b")
    written, unread = await publish(client, source, PAGES), await publish(client, source, 4, seed=1)
    await read(client, written.keys)
    done = await stratakv(meta_port, tmp_path, "drain", "dmp", "a", "--wait", "--timeout", "30s", "--json")
    assert done.status == 0, done.err
    assert done.json == {"is_done": True, "pages_moved": PAGES, "pages_left": 0, "bytes_left": 0}
    (row,) = [n for n in (await client.call(ListNodes(), Nodes)).nodes if n.segment.node == "a"]
    assert row.is_draining
    assert source.stop() == 0
    await listed(client, "b")
    assert await _found_bit_exact(client, written) == {"b": PAGES}
    assert await _found_bit_exact(client, unread) == {}


async def test_a_daemon_alone_keeps_its_pages_on_its_disk(
    client: MetaClient, start_daemon: StartDaemon, meta_port: int, tmp_path: Path
) -> None:
    disk = ("--disk-dir", str(tmp_path / "disk"))
    daemon = start_daemon(node="a", meta_port=meta_port, flags=disk)
    await listed(client, "a", "a/disk")
    written = await publish(client, daemon, PAGES)
    done = await stratakv(meta_port, tmp_path, "drain", "dmp", "a", "--all", "--wait", "--timeout", "30s")
    assert f"{PAGES} pages moved" in done.out
    daemon.kill()
    await listed(client)
    start_daemon(node="a", meta_port=meta_port, flags=disk)
    await listed(client, "a", "a/disk")
    assert await _found_bit_exact(client, written) == {"a/disk": PAGES}


@pytest.mark.parametrize("victim", ["source", "target"])
async def test_a_daemon_killed_while_pages_move_costs_cache_entries_only(
    client: MetaClient, source: DaemonProcess, target: DaemonProcess, victim: str
) -> None:
    await listed(client, "a", "b")
    written = await publish(client, source, PAGES)
    target.freeze()
    await client.call(SetDraining("a", is_draining=True, is_whole=True), DrainProgress)

    async def is_copying() -> bool:
        return (await client.call(GetStats(), Stats)).puts_pending > 0

    await eventually_async(is_copying, what="room to be granted on the target")
    if victim == "target":
        target.kill()
        await listed(client, "a")
        assert await _found_bit_exact(client, written) == {"a": PAGES}
    else:
        source.kill()
        target.thaw()
        await listed(client, "b")
        assert await _found_bit_exact(client, written) == {}
        await publish(client, target, PAGES, seed=1)


async def test_a_drain_that_is_undone_lets_pages_come_again(
    client: MetaClient, source: DaemonProcess, meta_port: int, tmp_path: Path
) -> None:
    await listed(client, "a")
    assert (await stratakv(meta_port, tmp_path, "drain", "dmp", "a")).status == 0
    assert (await stratakv(meta_port, tmp_path, "drain", "dmp", "a", "--undo")).status == 0
    await publish(client, source, PAGES)
    unknown = await stratakv(meta_port, tmp_path, "drain", "dmp", "nosuch")
    assert unknown.status == 1
    assert "nosuch" in unknown.err
