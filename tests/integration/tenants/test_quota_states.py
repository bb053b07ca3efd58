"""Whatever happens to DB nodes and to what PostgreSQL answers: each request settles once, and no limit is passed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from dbnode.tenants.account import SLICES, Reservation
from dbnode.tenants.ledger import DEAD_S
from dbnode.tenants.recovery import Ended
from stratakv.tenancy.values import TOKEN_MICROS, Limits, Tenant
from tests.integration.tenants.quota_world import QuotaWorld

NUM_NODES = 3
SMALL, LARGE = 500, 64_000
"""Of a tenant whose requests are taken one by one, and of one for which slices are leased ahead."""
_STATES = "SELECT request_id, state, charged_micros FROM stratakv.reservations WHERE state <> 'open'"
_names = iter(range(1_000_000))


class QuotaStates(RuleBasedStateMachine):
    """Reserve, settle, lose answers, crash, fall silent, take over, let time pass: in any order."""

    url = ""
    """Set by the test."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.world = QuotaWorld(self.url)
        self.run(self.world.start(NUM_NODES))
        number = next(_names)
        limits = (
            Limits(tokens_per_minute=SMALL, tokens_per_month=3 * SMALL, requests_per_minute=50),
            Limits(tokens_per_minute=LARGE, tokens_per_month=LARGE),
        )
        self.tenants: list[Tenant] = [
            self.run(self.world.tenant(f"t{number}-{index}", limit)) for index, limit in enumerate(limits)
        ]
        self.open: list[tuple[int, Reservation]] = []
        self.taken: dict[int, int] = {tenant.id: 0 for tenant in self.tenants}
        """What requests really took, whether anybody knows or not."""
        self.num_crashes = 0
        self.passed_s = 0.0
        self.ended: dict[str, tuple[str, int]] = {}
        self.requests = 0

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 30))

    def teardown(self) -> None:
        """Nodes that end leave no lease behind, whatever answers they have lost."""
        for _, reservation in self.open:
            reservation.settle(0)
        alive = [node.ledger.node for node in self.world.nodes if node.ledger.node]
        for node in self.world.nodes:
            node.ledger.lose_next = ""
            self.run(node.quotas.close())
        left = "SELECT count(*) FROM stratakv.quota_leases WHERE node = ANY ($1) AND amount_micros > 0"
        assert self.run(self.world.sql.fetchval(left, alive)) == 0
        self.run(self.world.sql.execute("DELETE FROM stratakv.tenants WHERE name <> 'default'"))
        self.run(self.world.sql.execute("DELETE FROM stratakv.quota_nodes"))
        self.run(self.world.close())
        self.loop.close()

    nodes = st.integers(0, NUM_NODES - 1)

    @rule(
        node=nodes,
        which=st.integers(0, 1),
        tokens=st.integers(1, 120),
        lose=st.sampled_from(("", "", "before", "after")),
    )
    def reserve(self, node: int, which: int, tokens: int, lose: str) -> None:
        self.requests += 1
        at = self.world.nodes[node]
        at.ledger.lose_next = lose
        outcome = self.run(at.reserve(f"r{next(_names)}", self.tenants[which], tokens))
        if isinstance(outcome, Reservation):
            self.open.append((node, outcome))

    @rule(pick=st.integers(0, 1000), share=st.integers(0, 4), again=st.booleans())
    def settle(self, pick: int, share: int, again: bool) -> None:
        if not self.open:
            return
        _, reservation = self.open.pop(pick % len(self.open))
        self._take(reservation, reservation.tokens_micros * share // 4)
        reservation.settle(reservation.tokens_micros * share // 4)
        if again:
            reservation.settle(reservation.tokens_micros)

    def _take(self, reservation: Reservation, micros: int) -> None:
        self.taken[reservation.account.tenant.id] += micros

    @rule(node=nodes, lose=st.sampled_from(("", "before", "after")))
    def flush(self, node: int, lose: str) -> None:
        self.world.nodes[node].ledger.lose_next = lose
        self.run(self.world.nodes[node].flush())

    @rule(node=nodes, has_journal=st.booleans())
    def crash(self, node: int, has_journal: bool) -> None:
        """Its requests end; workers may have written down what they took."""
        for at, reservation in self.open:
            if at == node:
                taken = reservation.tokens_micros // 2 // TOKEN_MICROS
                self._take(reservation, taken * TOKEN_MICROS)
                if has_journal:
                    self.world.journal[reservation.request_id] = Ended(taken, 0, 0)
        self.open = [(at, reservation) for at, reservation in self.open if at != node]
        self.num_crashes += 1
        self.world.crash(node)

    @rule()
    def miss_the_dead(self) -> None:
        """Who does not live any more falls silent, and is found."""
        alive = [node.ledger.node for node in self.world.nodes]
        gone = "UPDATE stratakv.quota_nodes SET seen_at = seen_at - interval '5 minutes' WHERE node <> ALL ($1)"
        self.run(self.world.sql.execute(gone, alive))
        self.run(self.world.recover())

    @rule(node=nodes)
    def freeze(self, node: int) -> None:
        """It lives, but is given up."""
        if name := self.world.nodes[node].ledger.node:
            self.num_crashes += 1
            self.run(self.world.silence(name, 2 * DEAD_S))
            self.run(self.world.recover())
            self.reserve(node, 1, 50, "")  # it does not know yet
            self.flush(node, "")

    @rule(seconds=st.floats(0.1, 20))
    def pass_time(self, seconds: float) -> None:
        self.passed_s += seconds
        self.run(self.world.pass_time(seconds))

    @invariant()
    def what_is_held_is_a_lease_or_an_open_reservation(self) -> None:
        assert self.run(self.world.broken()) == []

    @invariant()
    def an_ended_reservation_never_changes(self) -> None:
        rows = {
            row["request_id"]: (row["state"], row["charged_micros"]) for row in self.run(self.world.sql.fetch(_STATES))
        }
        for request_id, before in self.ended.items():
            assert rows[request_id] == before
        self.ended = rows

    @invariant()
    def no_limit_is_passed(self) -> None:
        for tenant in self.tenants:
            self._check_month(tenant)
            self._check_minute(tenant)

    def _check_month(self, tenant: Tenant) -> None:
        limit = tenant.limits.tokens_per_month
        assert limit is not None
        assert self.run(self.world.taken(tenant)) <= limit * TOKEN_MICROS
        slices = 0 if limit < LARGE else limit // SLICES * self.num_crashes
        assert self.taken[tenant.id] <= (limit + slices) * TOKEN_MICROS

    def _check_minute(self, tenant: Tenant) -> None:
        """Within any time, what leaks in it may pass, and the limit once."""
        limit = tenant.limits.tokens_per_minute
        assert limit is not None
        slices = 0 if limit < LARGE else limit // SLICES * self.num_crashes
        assert self.taken[tenant.id] <= (limit * (1 + (self.passed_s + 60) / 60) + slices) * TOKEN_MICROS


@pytest.mark.timeout(300)
def test_each_request_settles_once_and_no_limit_is_passed(metadata: str) -> None:
    QuotaStates.url = metadata
    run_state_machine_as_test(
        QuotaStates, settings=settings(max_examples=25, stateful_step_count=40, deadline=timedelta(seconds=60))
    )


def test_what_was_leased_ahead_when_the_answer_was_lost_goes_back(metadata: str) -> None:
    QuotaStates.url = metadata
    states = QuotaStates()
    states.reserve(node=2, which=0, tokens=1, lose="")
    states.reserve(node=2, which=1, tokens=1, lose="before")
    states.reserve(node=0, which=1, tokens=1, lose="")
    states.flush(node=2, lose="after")
    states.teardown()


def test_the_oracle_finds_a_lease_that_nobody_has(metadata: str) -> None:
    async def broken() -> list[asyncpg.Record]:
        world = QuotaWorld(metadata)
        await world.start(1)
        tenant = await world.tenant("acme", Limits(tokens_per_month=100))
        await world.nodes[0].reserve("a", tenant, 10)
        await world.sql.execute("DELETE FROM stratakv.reservations")
        found = await world.broken()
        await world.close()
        return found

    assert len(asyncio.run(broken())) == 1
