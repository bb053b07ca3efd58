"""Answers of a simulated worker share its steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnode.scheduler.fleet import Sent
from dbnode.simulation.decoding import Decoding
from dbnode.simulation.request import SimRequest
from tests.unit.dbnode.simulation.test_run import request


def answer(number: int, output_tokens: int) -> SimRequest:
    return SimRequest(number, request(0, [], output_tokens), Sent(0.0, 0))


def ends(decoding: Decoding, arrivals: list[tuple[float, SimRequest]]) -> dict[int, float]:
    """When each of them ends."""
    found: dict[int, float] = {}

    def run_until(until_s: float) -> None:
        while (end_s := decoding.next_end_s) is not None and end_s <= until_s:
            found.update({sim.number: end_s for sim in decoding.take_ended(end_s)})

    for at_s, sim in arrivals:
        run_until(at_s)
        decoding.add(at_s, sim)
    run_until(float("inf"))
    return found


def test_a_second_answer_slows_the_first_one_while_both_run() -> None:
    """A step takes 1 s for each of them: alone until 4, together until both have 10 and 3 tokens."""
    decoding = Decoding(lambda num_sequences, _: float(num_sequences))
    assert ends(decoding, [(0, answer(0, 11)), (4, answer(1, 4))]) == pytest.approx({1: 10.0, 0: 13.0})
    assert len(decoding) == 0
    assert decoding.next_end_s is None


def test_steps_that_take_the_same_for_all_end_each_answer_when_it_would_end_alone() -> None:
    arrivals = [(0.1 * number, answer(number, 7 * number + 1)) for number in range(20)]
    expected = {sim.number: at_s + 7 * sim.number * 0.03 for at_s, sim in arrivals}
    assert ends(Decoding(lambda *_: 0.03), arrivals) == expected


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 30)), min_size=1, max_size=20))
def test_every_answer_ends_once_and_gets_no_token_quicker_than_alone(sizes: list[tuple[float, int]]) -> None:
    arrivals = [(at_s, answer(number, size)) for number, (at_s, size) in enumerate(sorted(sizes))]
    found = ends(Decoding(lambda num_sequences, tokens: 0.01 * num_sequences + 1e-6 * tokens), arrivals)
    assert found.keys() == {sim.number for _, sim in arrivals}
    for at_s, sim in arrivals:
        assert found[sim.number] >= at_s + max(0, sim.request.output_tokens - 1) * 0.01 - 1e-9
