"""What requests are charged, by the DB node that had them or by one that reads the workers' journals."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dbnode.generate import Outcome, PromptTiers, Timings, Usage
from dbnode.tenants.charges import charged_micros
from dbnode.tenants.journals import added_up
from dbnode.tenants.recovery import Ended
from dbnode.worker_messages import EndedRequest
from stratakv.tenancy.values import TOKEN_MICROS, Limits

TIMES = Timings(0.0, 0.0, 0.0)


@given(st.integers(1, 10_000), st.integers(0, 20_000), st.integers(0, 10_000), st.integers(0, TOKEN_MICROS))
def test_no_more_is_charged_than_the_tokens_there_were_and_no_less_for_those_that_were_computed(
    prompt: int, cached: int, generated: int, ratio: int
) -> None:
    usage = Usage(prompt, generated, PromptTiers(computed=max(0, prompt - cached), l1=cached), TIMES)
    micros = charged_micros(Limits(cached_token_micros=ratio), usage, Outcome.COMPLETED)
    computed = max(0, prompt - cached) + generated
    assert computed * TOKEN_MICROS <= micros <= (prompt + generated) * TOKEN_MICROS
    assert micros == Ended(prompt, min(cached, prompt), generated).micros(ratio)


def test_a_request_that_failed_before_its_first_token_is_free_and_one_that_was_cancelled_is_not() -> None:
    usage = Usage(100, 0, PromptTiers(), TIMES)
    assert charged_micros(Limits(), usage, Outcome.FAILED) == 0
    assert charged_micros(Limits(), usage, Outcome.CANCELLED) == 100 * TOKEN_MICROS


def test_attempts_are_added_up_with_the_prompt_once() -> None:
    found = [
        EndedRequest("a-0p", 48, 16, 1),
        EndedRequest("a-0", 48, 48, 4),
        EndedRequest("a-1", 48, 48, 3),
        EndedRequest("sql-1f-0", 5, 0, 2),
        EndedRequest("other-0", 9, 9, 9),
        EndedRequest("a.1-0", 48, 48, 7),
    ]
    assert added_up(found, frozenset({"a", "sql-1f"})) == {"a": Ended(48, 16, 8), "sql-1f": Ended(5, 0, 2)}
