"""The worker's request bodies: what is out of range or unknown is refused by name, before any work."""

from __future__ import annotations

import msgspec
import pytest

from stratakv.errors import InvalidRequest
from stratakv.tenancy.values import OWNER_HEADER
from workers.api import logprobs_body, owner_of, parse_completion
from workers.engine.requests import TokenEvent, TokenLogprob


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1),
        ("top_p", 0),
        ("min_p", 2),
        ("stop", [""]),
        ("no_such_field", 1),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("logit_bias", {"x": 1}),
        ("logprobs", 1),
        ("min_tokens", 17),
    ],
)
def test_a_wrong_field_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=field):
        parse_completion(msgspec.json.encode({"prompt": [1], field: value}))


def test_a_plain_request_is_taken() -> None:
    assert parse_completion(b'{"prompt": [1, 2], "max_tokens": 3, "stop": "x"}').stop_strings == ("x",)


def test_logprobs_are_told_by_token_ids_and_never_infinite() -> None:
    token = TokenEvent("r", 7, 0, -0.25, (TokenLogprob(7, -0.25), TokenLogprob(9, float("-inf"))))
    assert logprobs_body([token]) == {
        "tokens": ["token_id:7"],
        "token_logprobs": [-0.25],
        "top_logprobs": [{"token_id:7": -0.25, "token_id:9": -9999.0}],
    }


def test_biases_are_by_token_id() -> None:
    request = parse_completion(b'{"prompt": [1], "logit_bias": {"17": -3}}')
    assert request.sampling().logit_bias == ((17, -3.0),)


@pytest.mark.parametrize(
    ("said", "owner"), [("7", 7), ("0", 0), ("", 0), ("-1", 0), ("acme", 0), ("9" * 30, 0), (None, 0)]
)
def test_whose_a_requests_blocks_are_is_said_by_a_header(said: str | None, owner: int) -> None:
    assert owner_of({} if said is None else {OWNER_HEADER: said}) == owner
