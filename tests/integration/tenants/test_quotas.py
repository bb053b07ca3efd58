"""Quotas of tenants, shared by several DB nodes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from dbnode.errors import QuotaExceeded
from dbnode.own_connection import OwnConnection
from dbnode.tenants.account import SLICES, Reservation
from dbnode.tenants.recovery import Ended
from stratakv.errors import StrataError, Unavailable
from stratakv.settings import DatabaseSettings, Secret, TenantSettings
from stratakv.tenancy.values import TOKEN_MICROS, Limits
from tests.integration.tenants.quota_world import QuotaWorld


@pytest.fixture
async def world(metadata: str) -> AsyncIterator[QuotaWorld]:
    made = QuotaWorld(metadata)
    await made.start(2)
    yield made
    await made.close()


def deadline(seconds: float = 30.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_a_thousand_clients_on_several_nodes_get_what_the_limit_is_and_not_a_token_more(
    world: QuotaWorld,
) -> None:
    tenant = await world.tenant("acme", Limits(tokens_per_month=20_000, requests_per_minute=100_000))
    runs = [asyncio.create_task(node.quotas.run()) for node in world.nodes]
    rng = random.Random(7)
    used = refused = 0

    async def client(number: int) -> None:
        nonlocal used, refused
        quotas = world.nodes[number % 2].quotas
        tokens = rng.randint(20, 60)
        try:
            reservation = await quotas.reserve(f"r{number}", tenant, tokens, deadline())
        except QuotaExceeded:
            refused += 1
            return
        assert reservation is not None
        await asyncio.sleep(rng.random() / 50)
        taken = tokens // 2
        used += taken
        reservation.settle(taken * TOKEN_MICROS)
        reservation.settle(tokens * TOKEN_MICROS)

    await asyncio.gather(*(client(number) for number in range(1000)))
    assert used <= 20_000
    assert refused
    for task in runs:
        task.cancel()
    for number, node in enumerate(world.nodes):
        await node.quotas.close()
        world.nodes[number] = world.node()
    assert await world.broken() == []
    assert await world.taken(tenant) == used * TOKEN_MICROS
    # what is left is there for whoever comes now, to the last token
    left = 20_000 - used
    assert isinstance(await world.nodes[0].reserve("all", tenant, left), Reservation)
    assert isinstance(await world.nodes[1].reserve("one more", tenant, 1), QuotaExceeded)


async def test_minute_limits_leak_and_say_when_to_come_again(world: QuotaWorld) -> None:
    tenant = await world.tenant("acme", Limits(tokens_per_minute=600, requests_per_minute=3))
    first, second = world.nodes
    made = [await first.reserve("a", tenant, 300), await second.reserve("b", tenant, 250)]
    refused = await first.reserve("c", tenant, 100)
    assert isinstance(refused, QuotaExceeded)
    assert refused.retry_after_s == pytest.approx(5, abs=0.5)  # 50 tokens at 10 a second
    assert refused.hint == f"retry_after_ms={round(refused.retry_after_s * 1000)}"
    for reservation, taken in zip(made, (100, 250), strict=True):
        assert isinstance(reservation, Reservation)
        reservation.settle(taken * TOKEN_MICROS)
    await first.flush()
    await second.flush()
    assert isinstance(await first.reserve("d", tenant, 200), Reservation)
    refused = await first.reserve("e", tenant, 1)
    assert isinstance(refused, QuotaExceeded)  # the fourth request
    assert refused.retry_after_s == pytest.approx(20, abs=1)
    await world.pass_time(60)
    assert isinstance(await second.reserve("f", tenant, 300), Reservation)
    told = second.quotas.headers(tenant)
    assert told["x-ratelimit-limit-tokens"] == "600"
    assert int(told["x-ratelimit-remaining-tokens"]) == pytest.approx(100, abs=2)
    assert told["x-ratelimit-remaining-requests"] == "2"
    too_many = await second.reserve("g", tenant, 601)
    assert isinstance(too_many, QuotaExceeded)
    assert too_many.retry_after_s is None


async def test_large_limits_cost_no_round_trip_per_request(world: QuotaWorld) -> None:
    tenant = await world.tenant("acme", Limits(tokens_per_minute=6_400_000, requests_per_minute=64_000))
    node = world.nodes[0]
    assert isinstance(await node.reserve("first", tenant, 100), Reservation)
    for number in range(500):
        reservation = await node.quotas.reserve(f"r{number}", tenant, 100, deadline())  # without any exchange
        assert reservation is not None
        reservation.settle(50 * TOKEN_MICROS)
    await node.flush()
    assert await world.broken() == []
    leased = await world.sql.fetchval("SELECT amount_micros FROM stratakv.quota_leases WHERE kind = 'tokens_minute'")
    assert 0 < leased <= 6_400_000 // SLICES * TOKEN_MICROS
    await node.quotas.close()
    assert await world.sql.fetchval("SELECT count(*) FROM stratakv.quota_leases") == 0
    assert await world.broken() == []


async def test_permits_are_shared_waited_for_and_given_on(world: QuotaWorld) -> None:
    tenant = await world.tenant("acme", Limits(parallel_requests=3))
    runs = [asyncio.create_task(node.quotas.run()) for node in world.nodes]
    running = most = 0

    async def client(number: int) -> None:
        nonlocal running, most
        reservation = await world.nodes[number % 2].quotas.reserve(f"r{number}", tenant, 10, deadline())
        assert reservation is not None
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        reservation.settle(0)

    await asyncio.gather(*(client(number) for number in range(40)))
    assert most == 3
    for task in runs:
        task.cancel()
    for node in world.nodes:
        await node.quotas.close()
    assert await world.broken() == []
    assert await world.sql.fetchval("SELECT sum(held_micros) FROM stratakv.quota_state") == 0


async def test_too_many_that_wait_for_a_permit_are_refused(metadata: str) -> None:
    world = QuotaWorld(metadata, TenantSettings(parallel_waiting_max=2))
    await world.start(1)
    tenant = await world.tenant("acme", Limits(parallel_requests=1))
    quotas = world.nodes[0].quotas
    run = asyncio.create_task(quotas.run())
    first = await quotas.reserve("a", tenant, 1, deadline())
    waiting = [asyncio.create_task(quotas.reserve(f"w{n}", tenant, 1, deadline())) for n in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(QuotaExceeded):
        await quotas.reserve("x", tenant, 1, deadline())
    waiting[0].cancel()
    assert first is not None
    first.settle(0)
    last = await waiting[1]
    assert last is not None
    last.settle(0)
    run.cancel()
    await asyncio.gather(run, *waiting, return_exceptions=True)
    await quotas.close()
    await world.close()


async def test_a_window_is_reserved_as_a_whole_or_not_at_all(world: QuotaWorld) -> None:
    tenant = await world.tenant("acme", Limits(tokens_per_month=1000))
    node = world.nodes[0]
    run = asyncio.create_task(node.quotas.run())
    window = await node.quotas.reserve_all([(f"w{n}", 90) for n in range(10)], tenant, deadline())
    assert len(window) == 10
    with pytest.raises(QuotaExceeded):
        await node.quotas.reserve_all([("x", 60), ("y", 60)], tenant, deadline())
    assert await world.taken(tenant) == 900 * TOKEN_MICROS
    for reservation in window:
        reservation.settle(0)
    assert len(await node.quotas.reserve_all([("x", 500), ("y", 500)], tenant, deadline())) == 2
    run.cancel()


async def test_reservations_of_a_dead_node_are_settled_from_the_workers_journals_or_stay_as_reserved(
    world: QuotaWorld,
) -> None:
    tenant = await world.tenant("acme", Limits(tokens_per_month=6400, parallel_requests=5))
    dead, alive = world.nodes
    for name in ("known", "unknown"):
        assert isinstance(await dead.reserve(name, tenant, 100), Reservation)
    world.journal["known"] = Ended(prompt_tokens=30, cached_tokens=20, generated_tokens=5)
    name = dead.ledger.node
    world.crash(0)
    await world.recover()
    assert await world.taken(tenant) >= 200 * TOKEN_MICROS  # nobody has missed it yet
    await world.silence(name, 30)
    world.workers_answer = False
    await world.recover()
    states = "SELECT state, charged_micros FROM stratakv.reservations ORDER BY request_id"
    assert [tuple(row) for row in await world.sql.fetch(states)] == [("settled", 35 * TOKEN_MICROS), ("open", None)]
    await world.silence(name, 300)
    await world.recover()
    assert [tuple(row) for row in await world.sql.fetch(states)] == [
        ("settled", 35 * TOKEN_MICROS),
        ("unsettled", 100 * TOKEN_MICROS),
    ]
    assert await world.broken() == []
    assert await world.taken(tenant) == 135 * TOKEN_MICROS
    assert await world.sql.fetchval("SELECT count(*) FROM stratakv.quota_nodes WHERE node = $1", name) == 0
    assert isinstance(await alive.reserve("next", tenant, 6265), Reservation)


async def test_while_postgresql_is_away_leases_are_used_up_then_limited_tenants_are_refused(
    world: QuotaWorld,
) -> None:
    large = await world.tenant("large", Limits(tokens_per_minute=640_000))
    small = await world.tenant("small", Limits(tokens_per_minute=100))
    unlimited = await world.tenant("unlimited", Limits())
    node = world.nodes[0]
    assert isinstance(await node.reserve("a", large, 100), Reservation)
    node.ledger.drop()
    node.ledger._connection = OwnConnection(DatabaseSettings(url=Secret("postgresql://127.0.0.1:1/x")), 1.0)
    outcomes: list[object] = [await node.reserve(f"r{n}", large, 1000) for n in range(15)]
    assert [isinstance(one, Reservation) for one in outcomes].count(True) >= 5
    assert isinstance(outcomes[-1], Unavailable)
    assert isinstance(await node.reserve("b", small, 10), Unavailable)
    assert await node.quotas.reserve("c", unlimited, 10, deadline()) is None


async def test_a_node_that_was_given_up_begins_anew(world: QuotaWorld) -> None:
    tenant = await world.tenant("acme", Limits(tokens_per_month=640_000))
    frozen = world.nodes[0]
    before = await frozen.reserve("a", tenant, 100)
    assert isinstance(before, Reservation)
    name = frozen.ledger.node
    await world.silence(name, 3000)
    await world.recover()
    outcome: object = await frozen.reserve("b", tenant, 20_000)
    assert isinstance(outcome, StrataError)
    assert isinstance(await frozen.reserve("c", tenant, 100), Reservation)
    assert frozen.ledger.node != name
    before.settle(10 * TOKEN_MICROS)  # too late
    await frozen.flush()
    assert await world.broken() == []
    state = "SELECT state FROM stratakv.reservations WHERE request_id = 'a'"
    assert await world.sql.fetchval(state) == "unsettled"
