"""A worker's events that come together: tokens as one, everything in order, and all before what went wrong."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnode.generate import FinishReason
from dbnode.worker_client import _gathered
from stratakv.errors import StrataError


def event(**fields: Any) -> bytes:
    return msgspec.json.encode(fields)


def tokens(*token_ids: int, **more: Any) -> bytes:
    return event(choices=[{"index": 0, "token_ids": list(token_ids), "finish_reason": None, **more}])


END = event(choices=[{"index": 0, "token_ids": [], "finish_reason": "length"}])
USAGE = event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 2})


@given(st.lists(st.sampled_from([tokens(1), tokens(2, 3), tokens(4, logprobs={"token_logprobs": [-1.0]}), USAGE])))
def test_no_token_is_lost_or_moved(events: list[bytes]) -> None:
    chunks = list(_gathered("w", events))
    told = [
        token
        for payload in events
        for choice in msgspec.json.decode(payload)["choices"]
        for token in choice["token_ids"]
    ]
    assert [token for chunk in chunks for token in chunk.token_ids] == told
    assert sum(len(chunk.scores) for chunk in chunks) == sum(b"logprobs" in payload for payload in events)
    assert sum(chunk.usage is not None for chunk in chunks) == events.count(USAGE)


def test_tokens_side_by_side_are_one_event() -> None:
    chunks = list(_gathered("w", [tokens(1), tokens(2), tokens(3), END, USAGE]))
    assert [chunk.token_ids for chunk in chunks] == [[1, 2, 3], [], []]
    assert [chunk.finish_reason for chunk in chunks] == [None, FinishReason.LENGTH, None]


def test_tokens_before_a_failure_are_told_first() -> None:
    chunks = _gathered("w", [tokens(1), tokens(2), event(error={"message": "broken"})])
    assert next(chunks).token_ids == [1, 2]
    with pytest.raises(StrataError, match="broken"):
        next(chunks)
