"""The bytes of the tokens of a text are the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratakv.models import pull
from stratakv.text import decode, encode, load_tokenizer
from stratakv.token_text import TokenTexts


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(pull("smollm2-135m", Path("~/.cache/stratakv").expanduser()))


@given(st.text(max_size=40))
def test_the_bytes_of_tokens_are_the_text(tokenizer: Any, text: str) -> None:
    texts = TokenTexts(tokenizer)
    token_ids = encode(tokenizer, text, special=False)
    whole = b"".join(texts.bytes_of(token_id) for token_id in token_ids)
    # The model's tokenizer has no token for some rare bytes, and leaves them out.
    assert whole.decode(errors="replace") == decode(tokenizer, token_ids, skip_special=False)


def test_special_tokens_are_their_names_and_unknown_ids_are_nothing(tokenizer: Any) -> None:
    texts = TokenTexts(tokenizer)
    assert texts.text_of(tokenizer.eos_token_id) == tokenizer.eos_token
    assert texts.bytes_of(10_000_000) == b""
