"""`stratakv cache` on a real meta server and daemon: it shows, checks and rules what is there."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio

from stratakv.keys import pack_keys
from stratakv.layout import HEADER_BYTES
from stratakv.pool.dmp_client import connect
from stratakv.pool.meta_client import MetaClient
from stratakv.wire import EPOCH_BYTES, Match, MatchPrefix, Registered, RegisterWorker, WorkerInfo, WorkerRole
from tests.integration.pool.command import stratakv
from tests.integration.pool.daemon import DaemonProcess
from tests.integration.pool.pages import LAYOUT, NAMESPACE, WrittenPages, soon
from tests.integration.pool.published import listed, publish

StartDaemon = Callable[..., DaemonProcess]
PAGES = 6


@pytest.fixture
def daemon(start_daemon: StartDaemon, meta_port: int) -> DaemonProcess:
    return start_daemon(meta_port=meta_port)


@pytest_asyncio.fixture(autouse=True)
async def worker(client: MetaClient) -> AsyncIterator[None]:
    """A worker that only says it lives."""
    info = WorkerInfo("w", os.urandom(EPOCH_BYTES), "http://w", WorkerRole.BOTH, "a-model", NAMESPACE, 2, 100)

    async def live() -> None:
        while True:
            await client.call(RegisterWorker(info), Registered)
            await asyncio.sleep(0.1)

    task = asyncio.create_task(live())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _published(client: MetaClient, daemon: DaemonProcess) -> WrittenPages:
    await listed(client, "dmp-t")
    return await publish(client, daemon, PAGES)


async def _num_found(client: MetaClient, written: WrittenPages) -> int:
    return (await client.call(MatchPrefix(NAMESPACE, pack_keys(written.keys)), Match)).num_blocks


async def test_stats_tell_segments_namespaces_and_counters(
    client: MetaClient, daemon: DaemonProcess, meta_port: int, tmp_path: Path
) -> None:
    await _published(client, daemon)
    stats = (await stratakv(meta_port, tmp_path, "cache", "stats", "--json")).json
    (node,) = stats["nodes"]
    assert (node["node"], node["tier"], node["pages"]) == ("dmp-t", "memory", PAGES)
    (namespace,) = stats["namespaces"]
    assert (namespace["namespace"], namespace["models"], namespace["blocks"]) == (NAMESPACE.hex(), ["a-model"], PAGES)
    assert stats["counters"]["blocks"] == PAGES
    table = (await stratakv(meta_port, tmp_path, "cache", "stats")).out
    assert "dmp-t" in table
    assert NAMESPACE.hex() in table


async def test_rules_are_set_changed_and_taken_back(
    client: MetaClient, daemon: DaemonProcess, meta_port: int, tmp_path: Path
) -> None:
    await _published(client, daemon)
    run = partial(stratakv, meta_port, tmp_path, "cache", "rule")
    assert "ttl 1h" in (await run("--model", "a-model", "--ttl", "1h", "--keep")).out
    (shown,) = (await run(NAMESPACE.hex()[:6], "--memory", "2GiB", "--no-keep", "--json")).json
    assert shown["rule"] == {"ttl_s": 3600.0, "memory_bytes_max": 2 << 30, "disk_bytes_max": 0, "is_kept": False}
    assert "no rule" in (await run("--model", "a-model", "--clear")).out
    unknown = await run("--model", "another", "--ttl", "1h")
    assert unknown.status == 1
    assert "another" in unknown.err


async def test_flushing_a_model_drops_its_pages(
    client: MetaClient, daemon: DaemonProcess, meta_port: int, tmp_path: Path
) -> None:
    written = await _published(client, daemon)
    assert (await stratakv(meta_port, tmp_path, "cache", "flush", "--model", "a-model", "--json")).json == {
        "blocks": PAGES
    }
    assert await _num_found(client, written) == 0


@pytest.mark.parametrize("at", [HEADER_BYTES + 3, 30], ids=["data", "header"])
async def test_verify_finds_and_drops_what_is_damaged(
    client: MetaClient, daemon: DaemonProcess, meta_port: int, tmp_path: Path, at: int
) -> None:
    written = await _published(client, daemon)
    whole = await stratakv(meta_port, tmp_path, "cache", "verify", "--node", "dmp-t", "--json")
    assert whole.status == 0, whole.err
    (found,) = whole.json["nodes"]
    assert (found["pages"], found["header_only"], found["damaged"]) == (PAGES, 0, [])
    _flip_a_bit(daemon, written.extents[4].offset + at)
    damaged = await stratakv(meta_port, tmp_path, "cache", "verify")
    assert damaged.status == 1
    assert written.keys[4].hex() in damaged.out
    assert await _num_found(client, written) == 4
    assert (await stratakv(meta_port, tmp_path, "cache", "verify")).status == 0


def _flip_a_bit(daemon: DaemonProcess, offset: int) -> None:
    connection = connect(daemon.segment, deadline=soon())
    memory = connection.transport.mapping()
    assert memory is not None
    memory[offset] ^= 1
    del memory
    connection.close()


async def test_only_headers_are_checked_where_layers_have_several_sizes(
    client: MetaClient, daemon: DaemonProcess, meta_port: int, tmp_path: Path
) -> None:
    sizes = iter((1, 2, 4))
    layers = tuple(
        replace(layer, ranges=tuple(replace(r, size_bytes=16 * n) for r in layer.ranges))
        for layer, n in zip(LAYOUT.layers, sizes, strict=True)
    )
    await listed(client, "dmp-t")
    await publish(client, daemon, PAGES, layout=replace(LAYOUT, layers=layers))
    (found,) = (await stratakv(meta_port, tmp_path, "cache", "verify", "--json")).json["nodes"]
    assert (found["pages"], found["header_only"], found["damaged"]) == (PAGES, PAGES, [])


async def test_verify_names_a_daemon_that_is_silent(
    client: MetaClient, daemon: DaemonProcess, meta_port: int, tmp_path: Path
) -> None:
    await _published(client, daemon)
    daemon.freeze()
    await listed(client)
    done = await stratakv(meta_port, tmp_path, "cache", "verify", "--json")
    assert (done.status, list(done.json["failures"])) == (1, ["dmp-t"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("flush", "--namespace", NAMESPACE.hex(), "--model", "another"), "a namespace and --model are both given"),
        (("flush", "--namespace", ""), "the name of the namespace is empty"),
        (("verify", "--rate", "0"), "--rate 0 reads nothing"),
    ],
)
async def test_what_was_not_meant_is_not_done(
    client: MetaClient,
    daemon: DaemonProcess,
    meta_port: int,
    tmp_path: Path,
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    written = await _published(client, daemon)
    done = await stratakv(meta_port, tmp_path, "cache", *arguments)
    assert done.status == 1
    assert expected in done.err
    assert await _num_found(client, written) == PAGES
