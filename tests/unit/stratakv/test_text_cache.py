"""Tokenising with a memory gives the same tokens as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratakv.models import pull
from stratakv.text import encode, load_tokenizer
from stratakv.text_cache import CachingEncoder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(pull("smollm2-135m", Path("~/.cache/stratakv").expanduser()))


pieces = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["<|im_start|>", "<|im_end|>", "\n", " ", "<|im_", "<repo_name>", "user\nHi", "12 345", "  x"]),
)


@settings(max_examples=300)
@given(texts=st.lists(st.lists(pieces, max_size=10).map("".join), min_size=1, max_size=4))
def test_any_text_has_the_same_tokens_with_and_without_memory(tokenizer: Any, texts: list[str]) -> None:
    cache = CachingEncoder(tokenizer, chars_max=50)
    for text in [*texts, *texts]:
        assert cache.encode(text) == encode(tokenizer, text, special=False)


def test_a_growing_conversation_is_tokenised_only_where_it_grows(tokenizer: Any) -> None:
    cache = CachingEncoder(tokenizer)
    history = "<|im_start|>user\n" + "word " * 1000 + "<|im_end|>\n"
    assert not cache.is_mostly_known(history, 100)
    cache.encode(history)
    assert cache.is_mostly_known(history + "<|im_start|>assistant\n", 100)


def test_the_memory_is_bounded(tokenizer: Any) -> None:
    cache = CachingEncoder(tokenizer, chars_max=1000)
    for number in range(200):
        cache.encode(f"<|im_end|>{number} " + "x" * 40)
    assert cache._num_chars <= 1000
    assert cache._num_chars == sum(len(piece) for _, piece in cache._tokens)
