"""Tenants' cache limits, from `stratakv quota set` to pages that leave: a real PostgreSQL, meta server and daemon with a disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import pytest_asyncio

from dbnode.tenants.cache_quotas import CacheQuotas
from stratakv.errors import StrataError
from stratakv.keys import pack_keys
from stratakv.pool.meta_client import MetaClient
from stratakv.settings import DatabaseSettings, Secret
from stratakv.tenancy.administration import Administration
from stratakv.wire import FindBlocks, Flush, Flushed, FoundBlocks, ListOwners, OwnerStates
from tests.integration.pool.command import stratakv
from tests.integration.pool.daemon import DaemonProcess
from tests.integration.pool.pages import LAYOUT, NAMESPACE, WrittenPages
from tests.integration.pool.published import listed, publish
from tests.service_process import ServiceProcess
from tests.support import eventually_async

StartDaemon = Callable[..., DaemonProcess]
ACME_MEMORY, ACME_DISK = 20, 10
"""Pages."""


@pytest.fixture
def admin(migrated_url: str) -> Iterator[Administration]:
    with Administration(migrated_url, "test") as admin:
        for name in ("acme", "beta"):
            admin.create_tenant(name, {})
        yield admin


@pytest_asyncio.fixture
async def quotas(migrated_url: str, client: MetaClient) -> AsyncIterator[CacheQuotas]:
    """A DB node's, synchronised when the test says so."""
    quotas = CacheQuotas(DatabaseSettings(url=Secret(migrated_url)), client)
    yield quotas
    quotas.close()


async def used(client: MetaClient) -> dict[str, tuple[int, int]]:
    """Pages in memory and on disk."""
    owners = (await client.call(ListOwners(), OwnerStates)).owners
    return {o.limit.name: (o.memory_bytes // LAYOUT.page_bytes, o.disk_bytes // LAYOUT.page_bytes) for o in owners}


async def positions(client: MetaClient, written: list[WrittenPages]) -> list[list[int]]:
    """Of each put's pages those that are found."""
    found = []
    for pages in written:
        missing = (await client.call(FindBlocks(NAMESPACE, pack_keys(pages.keys)), FoundBlocks)).missing
        found.append([at for at in range(len(pages.keys)) if at not in missing])
    return found


async def test_a_tenant_over_its_limits_loses_its_own_coldest_pages_and_no_one_elses(
    client: MetaClient,
    start_daemon: StartDaemon,
    meta_server: ServiceProcess,
    meta_port: int,
    migrated_url: str,
    admin: Administration,
    quotas: CacheQuotas,
    tmp_path: Path,
) -> None:
    disk = ("--segment-bytes", "2MiB", "--disk-dir", str(tmp_path / "disk"), "--disk-file-bytes", "1MiB")
    daemon = start_daemon(meta_port=meta_port, flags=disk)
    await listed(client, "dmp-t", "dmp-t/disk")
    sizes = [
        f"--cache-{tier}={pages * LAYOUT.page_bytes}" for tier, pages in (("memory", ACME_MEMORY), ("disk", ACME_DISK))
    ]
    done = await stratakv(meta_port, tmp_path, "quota", "set", "acme", *sizes, "--database", migrated_url)
    assert done.status == 0, done.err
    acme, beta = (admin.tenant(name)["id"] for name in ("acme", "beta"))
    others = [await publish(client, daemon, 30, owner=beta), await publish(client, daemon, 10)]
    written = [await publish(client, daemon, 5, owner=acme, seed=seed) for seed in range(5)]
    await quotas.sync(client)

    async def fits() -> bool:
        """Down to the low levels: nothing more is under way."""
        memory, on_disk = (await used(client)).get("acme", (99, 99))
        return memory <= ACME_MEMORY * 0.7 and on_disk <= ACME_DISK * 0.85

    await eventually_async(fits, timeout_s=20, what="acme to have no more than it may")
    await quotas.sync(client)
    before = await used(client)

    await asyncio.to_thread(meta_server.kill)
    meta_server.start()
    await listed(client, "dmp-t", "dmp-t/disk")
    assert {name.strip("()"): pages for name, pages in (await used(client)).items()} == {
        str(acme): before["acme"],
        str(beta): before["beta"],
    }, "whose pages are outlives a restart, and limits are told anew"
    written += [await publish(client, daemon, 5, owner=acme, seed=seed) for seed in range(5, 10)]
    await quotas.sync(client)
    await eventually_async(fits, timeout_s=20, what="acme to have no more than it may, again")

    found = await positions(client, written)
    assert found[-3:] == [list(range(5))] * 3, "what it wrote last stays"
    assert found[0] == [], "what it wrote first is gone"
    assert await positions(client, others) == [list(range(30)), list(range(10))]
    assert (await used(client))["beta"] == (30, 0)
    await quotas.sync(client)
    shown = await stratakv(meta_port, tmp_path, "quota", "show", "acme", "--database", migrated_url)
    memory, on_disk = (await used(client))["acme"]
    assert shown.json["cache_memory_used"] == memory * LAYOUT.page_bytes
    assert shown.json["cache_disk_used"] == on_disk * LAYOUT.page_bytes
    with psycopg.connect(migrated_url) as connection:
        rows = connection.execute(
            'SELECT "limit", maximum, used FROM stratakv.limits_in_use ORDER BY 1 DESC'
        ).fetchall()
    assert rows == [
        ("cache_memory_bytes", ACME_MEMORY * LAYOUT.page_bytes, memory * LAYOUT.page_bytes),
        ("cache_disk_bytes", ACME_DISK * LAYOUT.page_bytes, on_disk * LAYOUT.page_bytes),
    ]
    (listed_acme,) = [
        row
        for row in (await stratakv(meta_port, tmp_path, "cache", "stats", "--json")).json["tenants"]
        if row["name"] == "acme"
    ]
    assert (listed_acme["id"], listed_acme["memory_bytes_max"]) == (acme, ACME_MEMORY * LAYOUT.page_bytes)


async def test_a_meta_server_that_was_started_anew_is_told_the_limits_again(
    client: MetaClient,
    meta_server: ServiceProcess,
    admin: Administration,
    quotas: CacheQuotas,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dbnode.tenants.cache_quotas.SYNC_S", 0.1)
    admin.set_limits("acme", {"cache_memory_bytes": 5})
    syncing = asyncio.create_task(quotas.run())

    async def is_told() -> bool:
        try:
            owners = (await client.call(ListOwners(), OwnerStates)).owners
        except StrataError:
            return False
        return [(o.limit.name, o.limit.memory_bytes_max) for o in owners] == [("acme", 5)]

    await eventually_async(is_told, timeout_s=20, what="the limit to be told")
    await asyncio.to_thread(meta_server.kill)
    meta_server.start()
    await eventually_async(is_told, timeout_s=20, what="the limit to be told again")
    syncing.cancel()
    await asyncio.gather(syncing, return_exceptions=True)


async def test_what_a_tenant_no_longer_has_is_forgotten(
    client: MetaClient, start_daemon: StartDaemon, meta_port: int, admin: Administration, quotas: CacheQuotas
) -> None:
    daemon = start_daemon(meta_port=meta_port)
    await listed(client, "dmp-t")
    await publish(client, daemon, 3, owner=admin.tenant("beta")["id"])
    await publish(client, daemon, 3, owner=10**15)  # no tenant of this database
    await quotas.sync(client)
    assert admin.quotas("beta")[0]["cache_memory_used"] == 3 * LAYOUT.page_bytes
    await client.call(Flush(), Flushed)
    await quotas.sync(client)
    assert admin.quotas("beta")[0]["cache_memory_used"] == 0
