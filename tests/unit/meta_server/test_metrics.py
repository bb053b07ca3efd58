"""The pool's metrics add up: what was put, found, removed, and how long evicted pages had not been asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from meta_server.counts import AGE_BOUNDS_S, Histogram
from meta_server.metrics import PoolCollector
from stratakv import wire
from tests.pool_world import NAMESPACE, PAGE_BYTES, World

DAEMON_PAGES = 10


@pytest.fixture
def world() -> Iterator[World]:
    made = World(reclaim_high=0.8, reclaim_low=0.5, lease_s_max=10.0)
    made.start_daemon("a", DAEMON_PAGES)
    yield made
    made.close()


def told(world: World) -> dict[str, float]:
    """name{label values} → value, as a monitoring system reads it."""
    registry = CollectorRegistry()
    registry.register(PoolCollector(lambda: world.handlers))
    text = generate_latest(registry).decode()
    return {
        f"{s.name.removeprefix('stratakv_pool_')}{sorted(s.labels.values())}": s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def put(world: World, first: int, count: int, owner: int = 0) -> bytes:
    keys = b"".join(number.to_bytes(32, "big") for number in range(first, first + count))
    put_id = first.to_bytes(16, "big")
    request = wire.PutStart(put_id, NAMESPACE, keys, PAGE_BYTES, 16, timeout_s=20.0, owner=owner)
    grant = world.call(request, wire.PutGrant)
    assert grant.segment is not None
    extents = world.daemons["a"].allocate(put_id, count)
    world.call(wire.PutEnd(put_id, grant.segment.epoch, extents), wire.Done)
    return keys


def test_pages_found_evicted_and_lost_with_their_daemon_are_told(world: World) -> None:
    world.tick(1.0)
    keys = put(world, 1, 9)
    world.tick(20.0)
    world.tick(5.0)
    assert told(world)["segment_pages['a', 'memory']"] == 5
    assert told(world)["removed_pages_total['evicted', 'memory']"] == 4
    assert told(world)["removed_bytes_total['evicted', 'memory']"] == 4 * PAGE_BYTES
    assert told(world)["evicted_age_seconds_count['memory']"] == 4

    match = world.call(wire.MatchPrefix(NAMESPACE, keys, 1.0), wire.Match)
    world.call(wire.MatchPrefix(NAMESPACE, keys), wire.Match)
    now = told(world)
    assert now["asked_pages_total[]"] == 9, "who asks only for the count reads nothing"
    assert now["found_pages_total['memory']"] == match.num_blocks == 5
    assert (now["lookups_total[]"], now["lookup_hits_total[]"], now["leases[]"]) == (2, 2, 1)

    world.start_daemon("a", DAEMON_PAGES)
    assert told(world)["removed_pages_total['memory', 'void']"] == 5
    world.tick(0.1)
    assert told(world)["segment_pages['a', 'memory']"] == 0
    assert told(world)["segment_free_bytes['a', 'memory']"] == DAEMON_PAGES * PAGE_BYTES


def test_tenants_are_told_by_name_with_their_limits_as_far_as_these_are_known(world: World) -> None:
    world.tick(1.0)
    put(world, 1, 2, owner=7)
    put(world, 3, 1, owner=8)
    put(world, 4, 3)
    world.call(wire.SetOwnerLimits([wire.OwnerLimit(7, "acme", 10 * PAGE_BYTES)]), wire.Done)
    tenants = {name: value for name, value in told(world).items() if name.startswith("tenant")}
    assert tenants == {
        "tenant_bytes['acme', 'memory']": 2 * PAGE_BYTES,
        "tenant_bytes['acme', 'disk']": 0,
        "tenant_bytes['(8)', 'memory']": PAGE_BYTES,
        "tenant_bytes['(8)', 'disk']": 0,
        "tenant_limit_bytes['acme', 'memory']": 10 * PAGE_BYTES,
    }


def test_only_the_largest_tenants_have_series_of_their_own(world: World) -> None:
    world.tick(1.0)
    for owner in range(1, 5):
        put(world, 10 * owner, owner % 4 + 1, owner)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meta_server.metrics.OWNERS_SHOWN_MAX", 2)
        shown = {n: v for n, v in told(world).items() if n.startswith("tenant_bytes") and "memory" in n}
    assert {name: value / PAGE_BYTES for name, value in shown.items()} == {
        "tenant_bytes['(3)', 'memory']": 4,
        "tenant_bytes['(2)', 'memory']": 3,
        "tenant_bytes['(others)', 'memory']": 3,
    }


def test_a_sample_of_ages_stands_for_all_pages() -> None:
    histogram = Histogram()
    histogram.observe([5.0, 100.0], num_pages=50)
    histogram.observe([10.0], num_pages=1)
    histogram.observe([30 * 86400.0], num_pages=2)
    counts = dict(zip(AGE_BOUNDS_S, histogram.counts, strict=True))
    assert {bound: count for bound, count in counts.items() if count} == {10.0: 26, 300.0: 25, math.inf: 2}
    assert histogram.sum_s == 25 * 105 + 10 + 60 * 86400
