"""Several meta servers on one database: one leads, the others take over, and whoever is succeeded can write nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psycopg
import pytest

from stratakv.errors import StrataError, Unavailable
from stratakv.pool.fence import TermFence
from stratakv.pool.meta_client import MetaClient
from stratakv.pool.meta_errors import NotLeader
from stratakv.pool.meta_link import MetaLink
from stratakv.settings import MetaSettings
from stratakv.wire import (
    PROTOCOL_VERSION,
    DemoteLeader,
    Done,
    GetLeader,
    GetStats,
    Hello,
    LeaderState,
    Match,
    MatchPrefix,
    PutEnd,
    PutGrant,
    PutStart,
    Stats,
    Welcome,
)
from tests.integration.pool.command import stratakv
from tests.meta_process import NAMESPACE, PAGE_BYTES, MetaProcess, TestDaemon, meta_server, new_keys, put, start_put
from tests.support import eventually_async

LEASE_S = 1.0


async def ask(endpoint: str, request: GetLeader | GetStats | Hello, timeout_s: float = 1.0) -> object:
    """What this very server says."""
    link = MetaLink(endpoint, None)
    try:
        reply_type = {GetLeader: LeaderState, GetStats: Stats, Hello: Welcome}[type(request)]
        return await link.exchange(request, reply_type, timeout_s)
    finally:
        link.close("asked")


async def state_of(endpoint: str) -> LeaderState | None:
    try:
        answer = await ask(endpoint, GetLeader())
    except Unavailable:
        return None
    assert isinstance(answer, LeaderState)
    return answer


async def leads(endpoint: str) -> bool:
    state = await state_of(endpoint)
    return state is not None and state.is_leader


@asynccontextmanager
async def processes(url: str, directory: Path, count: int) -> AsyncIterator[list[MetaProcess]]:
    """Started one after another: the first one leads."""
    servers = []
    try:
        for number in range(count):
            (directory / str(number)).mkdir()
            server = MetaProcess(url, directory / str(number), leader_lease_s=LEASE_S, lease_s_max=1)
            servers.append(server)
            server.start()

            async def answers(endpoint: str = server.endpoint, leads: bool = number == 0) -> bool:
                state = await state_of(endpoint)
                return state is not None and state.is_leader is leads

            await eventually_async(answers, what="the meta server answers")
        yield servers
    finally:
        for server in servers:
            server.kill()


@asynccontextmanager
async def follower(*endpoints: str, **options: object) -> AsyncIterator[MetaClient]:
    """A client that knows all servers."""
    addresses = tuple(endpoint.removeprefix("tcp://") for endpoint in endpoints)
    async with MetaClient(MetaSettings(addresses=addresses), **options) as client:  # type: ignore[arg-type]
        yield client


async def test_one_that_stands_by_answers_everything_with_the_leader(migrated_url: str) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(meta_server(migrated_url))
        second = await stack.enter_async_context(meta_server(migrated_url))
        leader = first.removeprefix("tcp://")
        welcome = await ask(second, Hello(PROTOCOL_VERSION, "test", "test"))
        assert isinstance(welcome, Welcome)
        assert (welcome.is_leader, welcome.leader) == (False, leader)
        with pytest.raises(NotLeader) as refused:
            await ask(second, GetStats())
        assert getattr(refused.value, "leader", "") == leader
        state = await state_of(second)
        assert state is not None
        assert (state.is_leader, state.leader, state.term) == (False, leader, 0)
        async with follower(second) as client:
            assert client.endpoint == first, "a client that knows only the other one is told"
            await client.call(GetStats(), Stats)


async def test_a_leader_that_ends_in_order_is_succeeded_at_once(migrated_url: str) -> None:
    async with AsyncExitStack() as stack:
        async with meta_server(migrated_url, leader_lease_s=60.0) as first:
            second = await stack.enter_async_context(meta_server(migrated_url, leader_lease_s=60.0))
            client = await stack.enter_async_context(follower(first, second))
            daemon = TestDaemon(client, "n0", pages=100)
            await daemon.register()
            keys = new_keys(3)
            await put(client, daemon, keys)
        await eventually_async(lambda: leads(second), what="the other one leads")
        await client.insist(GetStats(), Stats, for_s=5.0)
        assert client.endpoint == second, "the client follows"
        await daemon.heartbeat()
        assert (await client.call(MatchPrefix(NAMESPACE, keys), Match)).num_blocks == 3


async def test_a_leader_lets_another_one_lead_on_request(migrated_url: str) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(meta_server(migrated_url, leader_lease_s=LEASE_S))
        second = await stack.enter_async_context(meta_server(migrated_url, leader_lease_s=LEASE_S))
        client = await stack.enter_async_context(follower(first, second))
        before = await client.call(GetLeader(), LeaderState)
        await client.call(DemoteLeader(), Done)
        await eventually_async(lambda: leads(second), what="the other one leads")
        await client.call(GetStats(), Stats)
        after = await client.call(GetLeader(), LeaderState)
        assert (after.server, after.term > before.term) == (second.removeprefix("tcp://"), True)


async def test_the_command_line_shows_who_leads_and_has_another_one_lead(migrated_url: str, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(meta_server(migrated_url))
        second = await stack.enter_async_context(meta_server(migrated_url))
        addresses = [endpoint.removeprefix("tcp://") for endpoint in (first, second)]
        known = f"--set=meta.addresses={','.join(addresses)}"
        shown = await stratakv(0, tmp_path, "meta", "servers", "--json", known)
        assert [shown.json[address]["is_leader"] for address in addresses] == [True, False]
        wrong = await stratakv(0, tmp_path, "meta", "servers", "demote", addresses[1], known)
        assert (wrong.status, "does not lead" in wrong.err) == (1, True)
        demoted = await stratakv(0, tmp_path, "meta", "servers", "demote", known)
        assert (demoted.status, demoted.out.strip()) == (0, f"{addresses[0]} no longer leads")

        async def is_told() -> bool:
            return f"standing by for {addresses[1]}" in (await stratakv(0, tmp_path, "meta", "servers", known)).out

        await eventually_async(is_told, what="the other one leads, and the first one knows it")


async def test_a_put_begun_with_one_leader_ends_with_the_next(migrated_url: str, tmp_path: Path) -> None:
    async with processes(migrated_url, tmp_path, 2) as servers, follower(*(s.endpoint for s in servers)) as client:
        daemon = TestDaemon(client, "n0", pages=1000)
        await daemon.register()
        keys, put_id, short_id = new_keys(5), os.urandom(16), os.urandom(16)
        grant = await start_put(client, keys, put_id)
        await start_put(client, new_keys(2), short_id, timeout_s=0.2)
        await put(client, daemon, new_keys(1))
        servers[0].kill()
        assert grant.segment is not None
        await client.insist(PutEnd(put_id, grant.segment.epoch, daemon.allocate(5)), Done, for_s=20.0)
        await daemon.heartbeat()
        assert (await client.call(MatchPrefix(NAMESPACE, keys), Match)).num_blocks == 5
        daemon.undecided = [short_id]

        async def void() -> bool:
            return (await daemon.heartbeat()).void_puts == [short_id]

        await eventually_async(void, what="a put that ran out meanwhile is void")


async def test_a_leader_that_was_frozen_past_its_lease_can_acknowledge_nothing(
    migrated_url: str, tmp_path: Path
) -> None:
    async with processes(migrated_url, tmp_path, 2) as servers, follower(servers[1].endpoint) as client:
        old = MetaLink(servers[0].endpoint, None)
        daemon = TestDaemon(client, "n0", pages=1000)
        await daemon.register()
        put_id, keys = os.urandom(16), new_keys(4)
        grant = await old.exchange(PutStart(put_id, NAMESPACE, keys, PAGE_BYTES, 16), PutGrant, 5.0)
        assert grant.segment is not None
        await put(client, daemon, new_keys(1))
        servers[0].signal(signal.SIGSTOP)
        # Both are at its door when it wakes up.
        end = PutEnd(put_id, grant.segment.epoch, daemon.allocate(4))
        late_end = asyncio.create_task(old.exchange(end, Done, 30.0))
        late_match = asyncio.create_task(old.exchange(MatchPrefix(NAMESPACE, keys, 1.0), Match, 30.0))
        await eventually_async(lambda: leads(servers[1].endpoint), what="the other one leads")
        servers[0].signal(signal.SIGCONT)
        with pytest.raises(NotLeader):
            await late_end
        with pytest.raises(NotLeader):
            await late_match
        await client.insist(GetStats(), Stats, for_s=5.0)
        await daemon.heartbeat()
        assert (await client.call(MatchPrefix(NAMESPACE, keys), Match)).num_blocks == 0
        await client.call(end, Done)
        assert (await client.call(MatchPrefix(NAMESPACE, keys), Match)).num_blocks == 4
        old.close("done")


async def test_postgresql_refuses_writes_of_every_term_but_the_latest(migrated_url: str) -> None:
    async with meta_server(migrated_url) as endpoint:
        state = await state_of(endpoint)
        assert state is not None
        with psycopg.connect(migrated_url, autocommit=True) as connection:
            write = "INSERT INTO stratakv.cache_rules VALUES ('n', 0, 0, 0, false)"
            for term in ("", "1", str(state.term - 1), str(state.term + 1)):
                connection.execute("SELECT set_config('stratakv.term', %s, false)", (term,))
                with pytest.raises(psycopg.Error) as refused:
                    connection.execute(write)
                assert refused.value.sqlstate == "SK001"
            connection.execute("SELECT set_config('stratakv.term', %s, false)", (str(state.term),))
            connection.execute(write)


async def test_answers_of_a_leader_that_was_succeeded_are_not_taken(migrated_url: str) -> None:
    async with meta_server(migrated_url) as endpoint:
        state = await state_of(endpoint)
        assert state is not None
        fence = TermFence()
        async with follower(endpoint, fence=fence) as client:
            await client.call(GetStats(), Stats)
            assert fence.admits(state.term + 1), "told by a writer"
            with pytest.raises(NotLeader):
                await client.call(GetStats(), Stats)
            with pytest.raises(StrataError):
                await client.call(GetStats(), Stats)
