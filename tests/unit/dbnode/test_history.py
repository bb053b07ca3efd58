"""Kept tokens: whatever a model generates, the next prompt begins with the same tokens and says the same text."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dbnode.conversations.history import Beginning, History
from dbnode.conversations.values import Item, Message
from stratakv.models import DEFAULT_MODEL, pull
from stratakv.text import chat_text, decode, encode, load_tokenizer

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(pull(DEFAULT_MODEL, Path("~/.cache/stratakv").expanduser()))


@cache
def history() -> History:
    return History(tokenizer())


def as_chat(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def items_of(messages: list[Message]) -> list[Item]:
    return [Item(f"msg_{place}", place, message, NOW) for place, message in enumerate(messages)]


def take_turn(said: list[Message], question: str, generated: list[int], *, cut: int | None = None) -> list[int]:
    """One turn, as the service takes it; the prompt's tokens. The answer is cut by a stop string."""
    said.append(Message("user", question))
    text = chat_text(tokenizer(), as_chat(said))
    begin = history().beginning(items_of(said), text)
    prompt = [*begin.token_ids, *encode(tokenizer(), text[begin.end_chars :], special=False)]
    assert decode(tokenizer(), prompt, skip_special=False) == decode(
        tokenizer(), encode(tokenizer(), text, special=False), skip_special=False
    )
    answer = decode(tokenizer(), generated)[:cut]
    said.append(Message("assistant", answer, history().kept(begin, text, prompt, answer, generated)))
    return prompt


words = st.text(max_size=30).filter(lambda text: "<|" not in text)
tokens = st.lists(st.integers(17, 49_000), max_size=12)


@given(turns=st.lists(st.tuples(words, tokens), min_size=1, max_size=5))
def test_each_prompt_begins_with_the_last_one_and_its_answer(turns: list[tuple[str, list[int]]]) -> None:
    said: list[Message] = []
    before: list[int] = []
    for question, generated in turns:
        prompt = take_turn(said, question, generated)
        assert prompt[: len(before)] == before
        kept = said[-1].kept
        before = [*prompt, *generated] if kept is not None else []
        if kept is None:  # the tokens end in the middle of a character
            break


@given(generated=st.lists(st.integers(17, 49_000), min_size=4, max_size=12), cut=st.integers(0, 5))
def test_an_answer_that_is_cut_keeps_no_tokens_unless_they_say_just_that(generated: list[int], cut: int) -> None:
    said: list[Message] = []
    take_turn(said, "Well?", generated, cut=cut)
    is_whole = said[-1].content == decode(tokenizer(), generated)
    assert (said[-1].kept is not None) == is_whole


def test_what_was_said_differently_is_tokenised_anew() -> None:
    said: list[Message] = []
    take_turn(said, "One?", encode(tokenizer(), "An answer.", special=False))
    text = chat_text(tokenizer(), as_chat([Message("user", "Another?"), *said[1:]]))
    assert history().beginning(items_of(said), text) == Beginning()


def test_a_part_that_is_missing_is_not_guessed() -> None:
    said: list[Message] = []
    for question in ("One?", "Two?"):
        take_turn(said, question, encode(tokenizer(), "An answer.", special=False))
    text = chat_text(tokenizer(), as_chat(said))
    assert history().beginning(items_of(said), text).position == 3
    without_first = [item for item in items_of(said) if item.position != 1]
    assert history().beginning(without_first, text) == Beginning()


def test_special_tokens_at_the_end_of_an_answer_are_no_part_of_it() -> None:
    said: list[Message] = []
    end = tokenizer().convert_tokens_to_ids("<|im_end|>")
    take_turn(said, "One?", [*encode(tokenizer(), "An answer.", special=False), int(str(end))])
    kept = said[-1].kept
    assert kept is not None
    assert kept.token_ids[-1] != end
