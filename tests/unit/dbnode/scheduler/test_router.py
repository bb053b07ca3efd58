"""The router's promises, for any fleet."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from dbnode.scheduler.cost import Candidate, Work, whole_cost
from dbnode.scheduler.policies.cost import CostPolicy
from dbnode.scheduler.router import route
from stratakv.wire import WorkerRole
from stratakv.worker_profile import Curves, PrefillPoint, WorkerProfile

SPLIT_MIN = 512
ANY = frozenset(WorkerRole)


def candidate(name: str, role: WorkerRole = WorkerRole.BOTH, **known: int | float) -> Candidate:
    facts = {"l1_tokens": 0, "pool_tokens": 0, "queued_tokens": 0, "running": 0, "prefill_tokens_per_s": 1000.0}
    return Candidate(name, f"http://{name}", role, namespace="n", **{**facts, **known})  # type: ignore[arg-type]


def work(prompt_tokens: int, max_tokens: int = 32) -> Work:
    return Work(prompt_tokens, max_tokens, kv_bytes_per_token=23_040)


candidates = st.lists(
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
    ),
    min_size=1,
    max_size=8,
)


@given(candidates, st.integers(1, 8000), st.integers(1, 1000), st.booleans(), st.integers())
def test_every_decision_names_workers_that_were_offered(
    fleet: list[Candidate], prompt_tokens: int, max_tokens: int, may_split: bool, seed: int
) -> None:
    decision = route(
        fleet, work(prompt_tokens, max_tokens), CostPolicy(), SPLIT_MIN, random.Random(seed), may_split=may_split
    )
    assert decision is not None
    assert decision.worker in fleet
    assert 1 <= decision.uncached_tokens <= prompt_tokens
    if decision.prefill is not None:
        assert may_split
        assert decision.prefill in fleet
        assert decision.prefill.role is WorkerRole.PREFILL
        assert decision.worker.role is not WorkerRole.PREFILL
        assert decision.prefill.namespace == decision.worker.namespace
        assert decision.uncached_tokens >= SPLIT_MIN


@given(candidates, st.integers(1, 8000))
def test_the_same_seed_gives_the_same_decision(fleet: list[Candidate], prompt_tokens: int) -> None:
    first, second = (route(fleet, work(prompt_tokens), CostPolicy(), SPLIT_MIN, random.Random(1)) for _ in range(2))
    assert first == second


@given(candidates, st.integers(1, 8000), st.integers(0, 7), st.integers(1, 100_000))
def test_more_load_never_makes_a_worker_cheaper(
    fleet: list[Candidate], prompt_tokens: int, which: int, more: int
) -> None:
    worker = fleet[which % len(fleet)]
    busier = replace(worker, queued_tokens=worker.queued_tokens + more)
    costs = [whole_cost(c, work(prompt_tokens), ANY).total_ms for c in (worker, busier)]
    assert costs[0] <= costs[1]


def test_nobody_is_chosen_from_an_empty_fleet() -> None:
    assert route([], work(10), CostPolicy(), SPLIT_MIN, random.Random(0)) is None


def test_ties_go_to_everybody() -> None:
    fleet = [candidate(f"w{i}") for i in range(4)]
    rng = random.Random(7)
    chosen = [route(fleet, work(100), CostPolicy(), SPLIT_MIN, rng) for _ in range(200)]
    counts = {name: sum(d is not None and d.worker.worker == name for d in chosen) for name in ("w0", "w1", "w2", "w3")}
    assert min(counts.values()) > 20, f"seed 7: {counts}"


def test_the_holder_of_the_prefix_is_preferred_at_equal_load() -> None:
    fleet = [candidate("a"), candidate("holder", l1_tokens=1600), candidate("b")]
    decision = route(fleet, work(1700), CostPolicy(), SPLIT_MIN, random.Random(0))
    assert decision is not None
    assert decision.worker.worker == "holder"


def test_an_overloaded_holder_is_left_alone() -> None:
    fleet = [candidate("idle"), candidate("holder", l1_tokens=1600, queued_tokens=5000)]
    decision = route(fleet, work(1700), CostPolicy(), SPLIT_MIN, random.Random(0))
    assert decision is not None
    assert decision.worker.worker == "idle"


def test_what_is_in_the_pool_makes_locality_worth_only_the_difference() -> None:
    fleet = [
        candidate("idle", pool_tokens=1600),
        candidate("holder", l1_tokens=1600, pool_tokens=1600, queued_tokens=100),
    ]
    decision = route(fleet, work(1700), CostPolicy(), SPLIT_MIN, random.Random(0))
    assert decision is not None
    assert decision.worker.worker == "idle"


def test_a_long_prompt_goes_to_whom_long_prompts_take_least() -> None:
    def measured(*seconds: float) -> Curves:
        points = zip((128, 512, 4096), seconds, strict=True)
        return Curves(WorkerProfile(tuple(PrefillPoint(tokens, 0, s) for tokens, s in points)))

    quick_start, quick_end = measured(0.05, 0.3, 8.0), measured(0.2, 0.4, 2.0)
    fleet = [replace(candidate("start"), curves=quick_start), replace(candidate("end"), curves=quick_end)]
    chosen = [route(fleet, work(n), CostPolicy(), 10_000, random.Random(0)) for n in (128, 4096)]
    assert [decision and decision.worker.worker for decision in chosen] == ["start", "end"]
    slow = replace(fleet[1], slowdown=10.0)
    decision = route([fleet[0], slow], work(4096), CostPolicy(), 10_000, random.Random(0))
    assert decision is not None
    assert decision.worker.worker == "start"


def test_a_role_is_only_a_preference() -> None:
    prefill = candidate("p", WorkerRole.PREFILL)
    alone = route([prefill], work(2000), CostPolicy(), SPLIT_MIN, random.Random(0))
    assert alone is not None
    assert (alone.worker, alone.prefill) == (prefill, None)
    busy = candidate("d", WorkerRole.DECODE, queued_tokens=50_000)
    decision = route([prefill, busy], work(100), CostPolicy(), SPLIT_MIN, random.Random(0))
    assert decision is not None
    assert decision.worker == prefill


def test_a_long_uncached_prompt_is_split_and_a_short_one_is_not() -> None:
    fleet = [candidate("p", WorkerRole.PREFILL), candidate("d", WorkerRole.DECODE)]
    long, short = (route(fleet, work(n), CostPolicy(), SPLIT_MIN, random.Random(0)) for n in (512, 511))
    assert long is not None
    assert short is not None
    assert (long.prefill, long.worker) == (fleet[0], fleet[1])
    assert (short.prefill, short.worker) == (None, fleet[1])


def test_a_long_prompt_is_not_split_while_it_would_wait_longer_for_a_prefill_worker_than_it_holds_up_elsewhere() -> (
    None
):
    """Each prompt takes 2 s to compute; 0.2 s of waiting are what the other role is worth."""

    def is_split(queued: int, decoding: int, also_queued: int = 0) -> bool:
        pending = queued // 2000
        fleet = [
            candidate("p", WorkerRole.PREFILL, queued_tokens=queued, running=pending),
            candidate("d", WorkerRole.DECODE, queued_tokens=also_queued, running=pending + decoding),
        ]
        decision = route(fleet, work(2000), CostPolicy(), SPLIT_MIN, random.Random(0))
        assert decision is not None
        return decision.prefill is not None

    assert is_split(queued=150, decoding=0)
    assert not is_split(queued=2000, decoding=0)
    assert is_split(queued=2000, decoding=1)
    assert not is_split(queued=6000, decoding=2)
    assert is_split(queued=6000, decoding=3)
    assert is_split(queued=2000, decoding=0, also_queued=2000)


def test_a_worker_without_room_for_the_prompt_is_passed_over_for_one_that_has_it() -> None:
    full, roomy = candidate("full", free_tokens=100), candidate("roomy", free_tokens=10_000, running=2)
    decision = route([full, roomy], work(400), CostPolicy(), SPLIT_MIN, random.Random(0))
    assert decision is not None
    assert decision.worker is roomy
    untold = candidate("untold")
    assert (
        whole_cost(untold, work(400), ANY).total_ms
        == whole_cost(replace(untold, free_tokens=400), work(400), ANY).total_ms
    )
