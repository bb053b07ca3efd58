"""Hot pages on real daemons: readers find them at their own, and when a daemon is killed nothing that lies elsewhere is missed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from stratakv.keys import BlockKey, pack_keys
from stratakv.pool.meta_client import MetaClient
from stratakv.wire import Done, GetStats, Match, MatchPrefix, ReleaseLease, Stats
from tests.integration.pool.command import stratakv
from tests.integration.pool.daemon import DaemonProcess
from tests.integration.pool.pages import NAMESPACE, WrittenPages
from tests.integration.pool.published import data_at, data_of, listed, publish
from tests.service_process import ServiceProcess
from tests.support import eventually, eventually_async

PAGES = 12
READS = 2


@pytest.fixture
def meta_flags() -> list[str]:
    return ["--heartbeat-s", "0.2", "--replicas-max", "3", "--replica-reads", str(READS)]


@pytest.fixture
def daemons(start_daemon: Callable[..., DaemonProcess], meta_port: int) -> dict[str, DaemonProcess]:
    return {node: start_daemon(node=node, meta_port=meta_port) for node in ("a", "b", "c")}


async def _read(client: MetaClient, keys: list[BlockKey], reader: str) -> Match:
    match = await client.call(MatchPrefix(NAMESPACE, pack_keys(keys), 5.0, reader), Match)
    await client.call(ReleaseLease(match.lease_id), Done)
    return match


async def _nodes(client: MetaClient, written: WrittenPages, reader: str) -> set[str]:
    """Where the pages are read, all of them and bit for bit."""
    match = await _read(client, written.keys, reader)
    assert match.num_blocks == PAGES
    assert data_at(match, written.keys) == data_of(written)
    return {place.node for place in match.places()}


async def _replicated(client: MetaClient, daemons: dict[str, DaemonProcess]) -> WrittenPages:
    """Pages that lie on all daemons, on `a` first."""
    await listed(client, *daemons)
    written = await publish(client, daemons["a"], PAGES)

    async def are_made() -> bool:
        for reader in ("b", "c"):
            await _read(client, written.keys, reader)
        return (await client.call(GetStats(), Stats)).replicas == 2 * PAGES

    await eventually_async(are_made, what="copies on b and c")
    return written


async def test_each_host_reads_at_its_own_daemon_and_a_daemon_that_is_killed_costs_no_hit(
    client: MetaClient, daemons: dict[str, DaemonProcess], meta_port: int, tmp_path: Path
) -> None:
    written = await _replicated(client, daemons)
    assert [await _nodes(client, written, reader) for reader in daemons] == [{"a"}, {"b"}, {"c"}]
    assert await _nodes(client, written, "") == {"a", "b", "c"}
    daemons["a"].kill()
    assert [await _nodes(client, written, reader) for reader in ("b", "c")] == [{"b"}, {"c"}]
    await listed(client, "b", "c")
    assert await _nodes(client, written, "") == {"b", "c"}
    shown = (await stratakv(meta_port, tmp_path, "cache", "stats")).out
    assert f"made {2 * PAGES}" in " ".join(shown.split())


async def test_all_places_are_found_again_after_a_restart_of_the_meta_server(
    client: MetaClient, daemons: dict[str, DaemonProcess], meta_server: ServiceProcess, migrated_url: str
) -> None:
    written = await _replicated(client, daemons)

    def rows() -> int:
        with psycopg.connect(migrated_url) as connection:
            (count,) = connection.execute("SELECT count(*) FROM stratakv.replicas").fetchone() or (0,)
        return int(count)

    eventually(lambda: rows() == 3 * PAGES, what="the table of replicas to be filled")
    meta_server.kill()
    meta_server.start()
    await listed(client, *daemons)
    assert [await _nodes(client, written, reader) for reader in daemons] == [{"a"}, {"b"}, {"c"}]
    daemons["a"].kill()
    await listed(client, "b", "c")
    assert await _nodes(client, written, "") == {"b", "c"}


async def test_every_place_is_checked(
    client: MetaClient, daemons: dict[str, DaemonProcess], meta_port: int, tmp_path: Path
) -> None:
    await _replicated(client, daemons)
    for node in daemons:
        checked = await stratakv(meta_port, tmp_path, "cache", "verify", "--node", node)
        assert checked.status == 0, checked.err
        assert str(PAGES) in checked.out
