"""The turn of tenants: shares by weight, nobody starves, priority within a tenant only."""

from __future__ import annotations

import random
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from dbnode.tenants.fair_queue import OVERTAKEN_MAX, FairQueue

COST_MAX = 5000
WEIGHTS = st.lists(st.integers(1, 1000), min_size=2, max_size=5)


@given(WEIGHTS, st.integers(0, 2**32), st.integers(20, 300))
def test_while_all_wait_what_they_get_differs_by_their_largest_requests_only(
    weights: list[int], seed: int, num_turns: int
) -> None:
    rng = random.Random(seed)
    queue = FairQueue[tuple[int, int]]()
    got = [0.0] * len(weights)
    largest = [0] * len(weights)

    def push(flow: int) -> None:
        cost = rng.randint(1, rng.choice((2, COST_MAX)))
        largest[flow] = max(largest[flow], cost)
        queue.push(flow, weights[flow], cost, rng.randint(-3, 3), (flow, cost))

    for flow in range(len(weights)):
        for _ in range(rng.randint(1, 4)):
            push(flow)
    for _ in range(num_turns):
        turn = queue.pop()
        assert turn is not None
        flow, cost = turn
        got[flow] += cost
        push(flow)
        for one, other in combinations(range(len(weights)), 2):
            difference = abs(got[one] / weights[one] - got[other] / weights[other])
            assert difference <= largest[one] / weights[one] + largest[other] / weights[other] + 1e-6


@given(st.lists(st.integers(1, COST_MAX), min_size=1, max_size=50), st.integers(1, 200))
def test_who_comes_to_a_long_queue_waits_for_one_request_of_each_other(costs: list[int], num_before: int) -> None:
    queue = FairQueue[str]()
    for number in range(num_before):
        queue.push(number % 3, 100, costs[number % len(costs)], -5, "others")
    for _ in range(num_before // 2):
        queue.pop()
    queue.push(9, 100, COST_MAX, 5, "mine")
    turns = [queue.pop() for _ in range(len(queue))]
    assert turns.index("mine") <= 3


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-2, 2), st.booleans()), max_size=60))
def test_within_a_flow_the_lowest_priority_goes_first_and_who_left_never(
    pushed: list[tuple[int, int, bool]],
) -> None:
    queue = FairQueue[tuple[int, int, int]]()
    waiting: dict[int, list[tuple[int, int, int]]] = {0: [], 1: [], 2: []}
    for number, (flow, priority, leaves) in enumerate(pushed):
        entry = queue.push(flow, 100, 10, priority, (flow, priority, number))
        if leaves:
            queue.remove(entry)
        else:
            waiting[flow].append((flow, priority, number))
    assert len(queue) == sum(map(len, waiting.values()))
    while (turn := queue.pop()) is not None:
        assert turn == min(waiting[turn[0]], key=lambda one: one[1:])
        waiting[turn[0]].remove(turn)
    assert not any(waiting.values())
    assert len(queue) == 0


@given(
    st.lists(st.integers(-3, 3), max_size=30), st.integers(0, 2**31 - 1), st.lists(st.integers(-(2**31), 3), min_size=1)
)
def test_a_low_priority_is_overtaken_so_often_and_no_more(ahead: list[int], mine: int, others: list[int]) -> None:
    queue = FairQueue[str]()
    for priority in ahead:
        queue.push(1, 100, 10, priority, "ahead")
    queue.push(1, 100, 10, mine, "mine")
    for number in range(len(ahead) + OVERTAKEN_MAX + 1):  # without end, they come faster than they are let in
        queue.push(1, 100, 10, others[number % len(others)], "later")
        queue.push(1, 100, 10, others[number % len(others)], "later")
        if queue.pop() == "mine":
            return
    raise AssertionError("it was passed over too often")


def test_who_asks_for_more_than_it_takes_is_given_the_rest_back() -> None:
    queue = FairQueue[int]()
    got = {0: 0, 1: 0}
    for flow in (0, 1):
        for _ in range(200):
            queue.push(flow, 100, 1000 if flow == 0 else 10, 0, flow)
    for _ in range(200):
        turn = queue.pop()
        assert turn is not None
        got[turn] += 1
        if turn == 0:
            queue.correct(0, 990)  # it took 10 as well
    assert abs(got[0] - got[1]) <= 4


def test_a_full_queue_makes_room_for_who_has_less_in_it() -> None:
    queue = FairQueue[str]()
    for number in range(6):
        queue.push(1, 100, 1, 0, f"one {number}")
    queue.push(2, 200, 1, 0, "two")
    assert queue.make_room(1, 100) is None
    assert queue.make_room(2, 200) == "one 5"
    assert queue.make_room(3, 1) is None
    assert queue.make_room(3, 100) == "one 4"
    assert len(queue) == 5


def test_flows_that_have_ended_are_forgotten() -> None:
    queue = FairQueue[int]()
    for flow in range(5000):
        queue.push(flow, 100, 1, 0, flow)
        queue.pop()
    assert len(queue._flows) <= 2048
