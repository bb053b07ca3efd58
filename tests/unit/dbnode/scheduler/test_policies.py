"""What every routing policy promises, and what each one's rule is."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from dbnode.scheduler.cost import Candidate, Work
from dbnode.scheduler.policies import make_policy
from dbnode.scheduler.policies.base import Stage
from dbnode.scheduler.router import route
from stratakv.settings import RouterPolicy
from stratakv.wire import WorkerRole

SPLIT_MIN = 512
ALL = list(RouterPolicy)


def candidate(name: str, role: WorkerRole = WorkerRole.BOTH, **known: int | float) -> Candidate:
    facts = {"l1_tokens": 0, "pool_tokens": 0, "queued_tokens": 0, "running": 0, "prefill_tokens_per_s": 1000.0}
    return Candidate(name, f"http://{name}", role, namespace="n", **{**facts, **known})  # type: ignore[arg-type]


def work(prompt_tokens: int) -> Work:
    return Work(prompt_tokens, 32, kv_bytes_per_token=23_040)


def chosen(policy: RouterPolicy, fleet: Sequence[Candidate], prompt_tokens: int, seed: int = 0) -> str:
    decision = route(fleet, work(prompt_tokens), make_policy(policy), SPLIT_MIN, random.Random(seed))
    assert decision is not None
    return decision.worker.worker


fleets = st.lists(
    st.builds(
        Candidate,
        worker=st.uuids().map(str),
        url=st.uuids().map(str),
        role=st.sampled_from(WorkerRole),
        namespace=st.sampled_from("ab"),
        l1_tokens=st.integers(0, 4000),
        pool_tokens=st.integers(0, 4000),
        queued_tokens=st.integers(0, 100_000),
        running=st.integers(0, 64),
        prefill_tokens_per_s=st.sampled_from([0.0, 10.0, 5000.0]),
        decode_step_s=st.sampled_from([0.0, 0.01, 0.5]),
        pool_bytes_per_s=st.sampled_from([0.0, 1e8, 5e9]),
        held_tokens=st.integers(0, 100_000),
        last_turn=st.integers(0, 1000),
        sent_tokens_mean=st.floats(0, 10_000),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("policy", ALL)
@given(fleet=fleets, prompt_tokens=st.integers(1, 8000), seed=st.integers())
def test_every_policy_chooses_among_what_it_is_given_and_says_why(
    policy: RouterPolicy, fleet: list[Candidate], prompt_tokens: int, seed: int
) -> None:
    rule = make_policy(policy)
    decision = route(fleet, work(prompt_tokens), rule, SPLIT_MIN, random.Random(seed))
    assert decision is not None
    assert decision.worker in fleet
    assert rule.reason(decision.worker, work(prompt_tokens), Stage.WHOLE)


@pytest.mark.parametrize("policy", ALL)
def test_equals_are_chosen_equally_often(policy: RouterPolicy) -> None:
    fleet = [candidate(f"w{number}") for number in range(4)]
    counts = Counter(chosen(policy, fleet, 100, seed) for seed in range(400))
    assert len(counts) == 4
    assert min(counts.values()) > 50, counts


@pytest.mark.parametrize("policy", ALL)
@given(seed=st.integers(), sizes=st.lists(st.integers(1, 8000), min_size=40, max_size=60))
def test_no_worker_starves_while_requests_pile_up_elsewhere(policy: RouterPolicy, seed: int, sizes: list[int]) -> None:
    """The same prompt over and over, nothing ever done: whoever holds it, load spreads in the end."""
    rng, rule = random.Random(seed), make_policy(policy)
    fleet = [candidate(f"w{number}") for number in range(3)]
    given_to: Counter[str] = Counter()
    for turn, size in enumerate(sizes * 4, 1):
        decision = route(fleet, work(size), rule, SPLIT_MIN, rng)
        assert decision is not None
        given_to[decision.worker.worker] += 1
        fleet = [after(c, size, turn) if c is decision.worker else c for c in fleet]
    assert len(given_to) == 3, given_to


def after(worker: Candidate, size: int, turn: int) -> Candidate:
    """The worker with one more request, of which it computes all."""
    count = worker.running + 1
    return replace(
        worker,
        l1_tokens=max(worker.l1_tokens, size),
        queued_tokens=worker.queued_tokens + size,
        held_tokens=worker.held_tokens + size,
        running=count,
        last_turn=turn,
        sent_tokens_mean=worker.sent_tokens_mean + (size - worker.sent_tokens_mean) / count,
    )


@pytest.mark.parametrize("policy", [p for p in ALL if p is not RouterPolicy.COST])
def test_a_rule_that_knows_no_roles_asks_others_only_when_there_is_nobody_else(policy: RouterPolicy) -> None:
    prefill, decode = candidate("p", WorkerRole.PREFILL), candidate("d", WorkerRole.DECODE, queued_tokens=50_000)
    assert chosen(policy, [prefill, decode], 100) == "d"
    assert chosen(policy, [prefill], 100) == "p"


def test_the_longer_all_queues_are_the_more_a_token_counts_that_need_not_be_computed() -> None:
    def fleet(queued_tokens: int) -> list[Candidate]:
        known = {"sent_tokens_mean": 1000.0}
        return [
            candidate("holder", l1_tokens=900, queued_tokens=queued_tokens + 1000, **known),
            candidate("other", queued_tokens=queued_tokens, **known),
        ]

    assert chosen(RouterPolicy.COST, fleet(0), 1000) == "other"
    assert chosen(RouterPolicy.COST, fleet(2000), 1000) == "holder"


def test_round_robin_takes_turns() -> None:
    fleet = [candidate("a", last_turn=3), candidate("b", last_turn=1, queued_tokens=10**6), candidate("c", last_turn=2)]
    assert chosen(RouterPolicy.ROUND_ROBIN, fleet, 100) == "b"


def test_least_load_looks_at_load_only() -> None:
    fleet = [candidate("holder", l1_tokens=4000, queued_tokens=10), candidate("idle")]
    assert chosen(RouterPolicy.LEAST_LOAD, fleet, 4000) == "idle"


def test_prefix_takes_the_best_match_if_it_is_worth_it_and_the_load_is_even() -> None:
    idle = candidate("idle")
    assert chosen(RouterPolicy.PREFIX, [candidate("holder", l1_tokens=400, queued_tokens=9000), idle], 1000) == "holder"
    assert chosen(RouterPolicy.PREFIX, [candidate("holder", l1_tokens=200, queued_tokens=9000), idle], 1000) == "idle"
    assert chosen(RouterPolicy.PREFIX, [candidate("holder", l1_tokens=400, running=40), idle], 1000) == "idle"


def test_dynamo_adds_what_is_queued_and_decoded_less_a_credit() -> None:
    scores = make_policy(RouterPolicy.DYNAMO).scores(
        [candidate("w", l1_tokens=600, pool_tokens=1000, queued_tokens=50, held_tokens=70)], work(1000), Stage.WHOLE
    )
    assert scores == [50 + 1000 - (600 + 0.75 * 400) + 70 + 1000]


def test_aibrix_prices_requests_and_tokens() -> None:
    scores = make_policy(RouterPolicy.AIBRIX).scores(
        [candidate("w", l1_tokens=600, running=3, sent_tokens_mean=100)], work(1000), Stage.WHOLE
    )
    assert scores == [pytest.approx(3 * 100 + (0.005 * 600 + 1) + (0.001 * 400**1.5 + 5))]
