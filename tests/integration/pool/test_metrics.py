"""What daemons and the meta server tell a monitoring system: pages are counted in every tier, whatever way they take."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stratakv.pool.meta_client import MetaClient
from tests.integration.pool.daemon import DaemonProcess
from tests.integration.pool.pages import LAYOUT, WrittenPages
from tests.integration.pool.published import data_at, data_of, listed, publish, read
from tests.support import eventually_async, free_port

NUM_PAGES = 16
Samples = dict[str, float]
StartDaemon = Callable[..., DaemonProcess]


@pytest.fixture
def metrics_port() -> int:
    return free_port()


@pytest.fixture
def meta_flags(metrics_port: int) -> list[str]:
    """Everything cold leaves memory, and may come back."""
    port = ["--metrics-port", str(metrics_port)]
    return ["--heartbeat-s", "0.2", "--demote-high", "0.05", "--demote-low", "0", *port]


def scrape(port: int) -> Samples:
    """name{label values, in order of their names} → value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        f"{s.name}{{{','.join(s.labels[name] for name in sorted(s.labels))}}}".removesuffix("{}"): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


async def scraped(port: int) -> Samples:
    return await asyncio.to_thread(scrape, port)


async def _shows(port: int, **expected: float) -> Samples:
    """What is told once it tells these, given without `stratakv_` and with `__` before a label."""
    wanted = {_sample(name): value for name, value in expected.items()}
    told: Samples = {}

    async def are_told() -> bool:
        told.update(await scraped(port))
        return wanted.items() <= told.items()

    await eventually_async(are_told, what=f"{wanted} to be told")
    return told


def _sample(name: str) -> str:
    stem, _, label = name.partition("__")
    return f"stratakv_{stem}{{{label}}}" if label else f"stratakv_{stem}"


async def test_pages_are_counted_in_every_tier(
    client: MetaClient, start_daemon: StartDaemon, meta_port: int, metrics_port: int, tmp_path: Path
) -> None:
    disk = ["--segment-bytes", "2MiB", "--disk-dir", str(tmp_path / "disk"), "--disk-scrub-bytes-per-s", "64MiB"]
    daemon = start_daemon(meta_port=meta_port, flags=disk)
    await listed(client, "dmp-t", "dmp-t/disk")
    written = await publish(client, daemon, NUM_PAGES)
    size = NUM_PAGES * LAYOUT.page_bytes

    told = await _shows(daemon.segment.port, dmp_pages__disk=NUM_PAGES, dmp_pages__memory=0)
    assert told["stratakv_dmp_granted_pages_total"] == NUM_PAGES
    assert told["stratakv_dmp_granted_bytes_total"] == size
    assert told["stratakv_dmp_moved_pages_total{demote}"] == NUM_PAGES
    assert told["stratakv_dmp_moved_bytes_total{demote}"] == told["stratakv_dmp_used_bytes{disk}"] == size
    assert told["stratakv_dmp_size_bytes{memory}"] == told["stratakv_dmp_free_bytes{memory}"] == 2 << 20
    assert told["stratakv_dmp_disk_read_only"] == 0

    assert data_at(await read(client, written.keys), written.keys) == data_of(written)
    told = await scraped(daemon.segment.port)
    assert told["stratakv_dmp_read_bytes_total{disk}"] >= NUM_PAGES * LAYOUT.data_bytes
    assert told["stratakv_dmp_read_seconds_total{disk}"] > 0

    told = await scraped(metrics_port)
    assert told["stratakv_pool_demoted_pages_total"] == NUM_PAGES
    assert told["stratakv_pool_segment_pages{dmp-t/disk,disk}"] == NUM_PAGES
    assert told["stratakv_pool_segment_committed_bytes{dmp-t/disk,disk}"] == size
    assert told["stratakv_pool_found_pages_total{disk}"] == told["stratakv_pool_asked_pages_total"] == NUM_PAGES
    assert told["stratakv_pool_removed_pages_total{moved,memory}"] == NUM_PAGES

    await read(client, written.keys[:4])
    await _shows(metrics_port, pool_promoted_pages_total=4)
    told = await scraped(daemon.segment.port)
    assert told["stratakv_dmp_moved_pages_total{promote}"] == 4

    _damage_a_page_on_disk(tmp_path / "disk/dmp-t", written)
    await _shows(daemon.segment.port, dmp_damaged_pages_total=1)
    assert (await scraped(daemon.segment.port))["stratakv_dmp_scrubbed_bytes_total"] > 0

    async def is_dropped() -> bool:
        return (await scraped(metrics_port)).get("stratakv_pool_removed_pages_total{corrupt,disk}") == 1

    await eventually_async(is_dropped, what="the damaged page to be dropped")


def _damage_a_page_on_disk(directory: Path, written: WrittenPages) -> None:
    """The last page: it was not read often, so that it stays there."""
    content = b"".join(written.data[0][NUM_PAGES - 1])
    (path,) = directory.glob("*.pages")
    at = path.read_bytes().index(content)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([content[0] ^ 1]))


def test_a_daemon_answers_http_with_its_metrics_only(daemon: DaemonProcess) -> None:
    assert scrape(daemon.segment.port)["stratakv_dmp_connections"] >= 1
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{daemon.segment.port}/", timeout=10)


def test_an_http_request_without_end_ends_its_connection_only(daemon: DaemonProcess) -> None:
    with socket.create_connection(("127.0.0.1", daemon.segment.port), timeout=10) as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\n" + b"x" * 9000)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    assert scrape(daemon.segment.port)["stratakv_dmp_connections"] >= 1
