"""What is remembered of prompts that workers died of, and that suspects take turns."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnode.errors import PoisonPrompt
from dbnode.scheduler.planner import PromptKeys
from dbnode.suspects import PromptId, Suspects, prompt_id
from stratakv.errors import DeadlineExceeded

URL = "http://127.0.0.1:1"
PROMPT = PromptId(b"p")


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def suspects(clock: Clock) -> Suspects:
    return Suspects(60.0, clock)


def in_a_minute() -> float:
    return asyncio.get_running_loop().time() + 60


async def test_a_prompt_that_fails_its_trial_is_refused_until_it_is_forgotten(suspects: Suspects, clock: Clock) -> None:
    async with suspects.trial(URL, in_a_minute()) as trial:
        assert suspects.is_cause(PROMPT, trial)
    with pytest.raises(PoisonPrompt, match="died of this prompt") as refused:
        suspects.check(PROMPT)
    assert not refused.value.retryable
    suspects.check(PromptId(b"another"))
    assert suspects.num_remembered == 1
    clock.now_s += 60
    suspects.check(PROMPT)
    assert suspects.num_remembered == 0


async def test_one_that_had_passed_is_refused_when_it_happens_again(suspects: Suspects) -> None:
    async with suspects.trial(URL, in_a_minute()) as trial:
        trial.passed()
        assert suspects.is_cause(PROMPT, trial)
        suspects.check(PROMPT)
        assert suspects.is_cause(PROMPT, trial)
    with pytest.raises(PoisonPrompt):
        suspects.check(PROMPT)


async def test_nothing_is_remembered_where_it_is_switched_off() -> None:
    suspects = Suspects(0.0)
    async with suspects.trial(URL, in_a_minute()) as trial:
        assert suspects.is_cause(PROMPT, trial)
    suspects.check(PROMPT)


async def test_memory_is_bounded(suspects: Suspects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbnode.suspects.PROMPTS_MAX", 3)
    async with suspects.trial(URL, in_a_minute()) as trial:
        for number in range(5):
            assert suspects.is_cause(PromptId(bytes([number])), trial)
    assert suspects.num_remembered == 3
    suspects.check(PromptId(bytes([0])))
    with pytest.raises(PoisonPrompt):
        suspects.check(PromptId(bytes([4])))


async def test_one_that_had_passed_is_cleared_by_the_one_on_trial(suspects: Suspects) -> None:
    poison = PromptId(b"poison")
    for poison_is_first in (True, False):
        async with suspects.trial(URL, in_a_minute()) as innocent:
            innocent.passed()
            async with suspects.trial(URL, in_a_minute()) as guilty:
                if not poison_is_first:
                    assert not suspects.is_cause(PROMPT, innocent)
                assert suspects.is_cause(poison, guilty)
            if poison_is_first:
                assert not suspects.is_cause(PROMPT, innocent)
    assert suspects.num_remembered == 1
    suspects.check(PROMPT)


async def test_suspects_take_turns_on_a_worker_up_to_their_first_token(suspects: Suspects) -> None:
    here: list[int] = []
    most = 0

    async def suspect(number: int) -> None:
        nonlocal most
        async with suspects.trial(URL, in_a_minute()) as trial:
            here.append(number)
            most = max(most, len(here))
            await asyncio.sleep(0)
            here.remove(number)
            trial.passed()
            await asyncio.sleep(0)

    async with suspects.trial("http://127.0.0.1:2", in_a_minute()):
        await asyncio.gather(*(suspect(number) for number in range(5)))
    assert most == 1


async def test_waiting_for_a_turn_ends_at_the_deadline_and_when_it_is_cancelled(suspects: Suspects) -> None:
    async with suspects.trial(URL, in_a_minute()):
        with pytest.raises(DeadlineExceeded):
            async with suspects.trial(URL, asyncio.get_running_loop().time()):
                raise AssertionError("it was not its turn")
        waiting = asyncio.ensure_future(suspects.trial(URL, in_a_minute()).__aenter__())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    async with suspects.trial(URL, in_a_minute()):
        pass


PROMPTS = st.tuples(st.lists(st.integers(0, 50_000), max_size=40), st.none() | st.text(max_size=5))


@given(PROMPTS, PROMPTS)
def test_prompts_are_told_apart_by_tokens_and_salt(
    one: tuple[list[int], str | None], other: tuple[list[int], str | None]
) -> None:
    assert (prompt_id(PromptKeys(*one)) == prompt_id(PromptKeys(*other))) == (one == other)
