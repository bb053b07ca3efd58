"""Folding: every text is read once, in order, in prompts that fit, until one answer is left."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnode.sql_fold import GROUPS_RUNNING_MAX, Fold, parse_fold
from stratakv.errors import ContextTooLong, InvalidRequest

FRAME_TOKENS = 5
WORDS = st.lists(st.sampled_from("abc"), max_size=60).map(" ".join)


class Model:
    """Counts words as tokens, and answers a prompt with how many words of the texts it read: `n3`."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.running = self.most_running = 0

    async def count(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    async def count_prompt(self, prompt: str) -> int:
        return FRAME_TOKENS + len(prompt.split())

    async def answer(self, prompt: str) -> str:
        self.prompts.append(prompt)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        words = prompt.split()[1:]
        return f"n{sum(int(word[1:]) if word[0] == 'n' else 1 for word in words)}"

    def fold(self, room_tokens: int, answer_tokens_max: int = 1) -> Fold:
        return Fold("Count:", room_tokens, answer_tokens_max, self.count, self.count_prompt, self.answer)


@given(st.lists(WORDS, min_size=1, max_size=30), st.integers(13, 80))
def test_every_text_is_read_once_in_order_and_every_prompt_fits(pieces: list[str], room_tokens: int) -> None:
    model = Model()
    answer = asyncio.run(model.fold(room_tokens).run(pieces))
    assert answer == f"n{sum(len(piece.split()) for piece in pieces)}"
    assert all(FRAME_TOKENS + len(prompt.split()) <= room_tokens for prompt in model.prompts)
    read = [word for prompt in model.prompts for word in prompt.split()[1:] if word[0] != "n"]
    assert read == " ".join(pieces).split()
    assert model.most_running <= GROUPS_RUNNING_MAX


async def test_what_fits_is_one_prompt() -> None:
    model = Model()
    assert await model.fold(100).run(["a b", "", "c"]) == "n3"
    assert model.prompts == ["Count:\n\na b\n\n\n\nc"]


async def test_groups_of_a_level_run_at_once() -> None:
    model = Model()
    await model.fold(20).run(["a b c d e f g h"] * 10)
    assert model.most_running == 10


async def test_it_is_refused_before_any_work_if_it_could_not_end() -> None:
    model = Model()
    for room_tokens, answer_tokens_max in ((20, 9), (7, 1)):
        with pytest.raises(ContextTooLong) as caught:
            await model.fold(room_tokens, answer_tokens_max).run(["a b c d e f"] * 10)
        assert caught.value.hint is not None
    assert model.prompts == []


async def test_first_failure_is_told_and_stops_the_others() -> None:
    model = Model()

    async def fail(prompt: str) -> str:
        model.prompts.append(prompt)
        if len(model.prompts) == 1:
            raise ContextTooLong("no")
        await asyncio.sleep(60)
        return ""

    fold = Fold("Count:", 12, 1, model.count, model.count_prompt, fail)
    with pytest.raises(ContextTooLong, match="no"):
        await fold.run(["a b c"] * 3)


@pytest.mark.parametrize(
    "text", ["", "5", "[]", '{"instruction": "x", "pieces": []}', '{"instruction": 1, "pieces": ["a"]}']
)
def test_prompt_that_infer_agg_did_not_make_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="@fold"):
        parse_fold(text)
