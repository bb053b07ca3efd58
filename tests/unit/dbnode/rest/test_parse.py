"""Request bodies: anything is either a request or an InvalidRequest, and nothing is silently ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnode.generate import Sampling, StructuredOutputs
from dbnode.rest.parse import CHAT, COMPLETION, Asked, Parsed, parse_chat, parse_completion
from dbnode.rest.tokens import TOKENIZE
from stratakv.errors import InvalidRequest

ASKED = Asked("id", "trace")
NAMES = [
    "messages",
    "prompt",
    "max_tokens",
    "temperature",
    "stop",
    "seed",
    "stream",
    "stream_options",
    "n",
    "tools",
    "top_k",
    "response_format",
]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def chat(**fields: Any) -> Parsed:
    body = {"messages": [{"role": "user", "content": "x"}]} | fields
    return parse_chat(json.dumps(body).encode(), ASKED)


@given(st.binary(max_size=200) | st.dictionaries(st.sampled_from(NAMES), values).map(lambda d: json.dumps(d).encode()))
def test_any_bytes_are_a_request_or_an_invalid_request(body: bytes) -> None:
    for parse in (parse_chat, parse_completion):
        try:
            parsed = parse(body, ASKED)
        except InvalidRequest:
            continue
        assert isinstance(parsed.request.sampling, Sampling)


def test_fields_arrive_where_they_belong() -> None:
    parsed = chat(
        max_completion_tokens=7, temperature=0, top_p=0.5, top_k=-1, min_p=0.1, seed=3, stop="x", ignore_eos=True
    )
    expected = Sampling(7, 0.0, 0.5, 0, 0.1, 3, ("x",), True)
    assert parsed.request.sampling == expected


def test_priority_and_salt_are_as_in_vllm() -> None:
    request = chat(priority=-4, cache_salt="team a").request
    assert (request.priority, request.cache_salt) == (-4, "team a")
    assert (chat().request.priority, chat(cache_salt=None).request.cache_salt) == (0, None)
    for wrong in (
        {"slo_class": "fast"},
        {"priority": 1.5},
        {"priority": "high"},
        {"cache_salt": ""},
        {"cache_salt": 5},
    ):
        with pytest.raises(InvalidRequest) as caught:
            chat(**wrong)
        assert caught.value.param == next(iter(wrong))


def test_defaults_are_openais() -> None:
    assert chat().request.sampling == Sampling(max_tokens=None, temperature=1.0)
    completion = parse_completion(b'{"prompt": [1, 2]}', ASKED).request
    assert completion.sampling.max_tokens == 16
    assert completion.prompt == (1, 2)


@pytest.mark.parametrize("prompt", [None, [], ["a", 1], [[1], "a"], [[]], [True], 5, {}, ["x"] * 129])
def test_only_prompts_of_text_or_tokens_are_taken(prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_completion(json.dumps({"prompt": prompt}).encode(), ASKED)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("field", "value"),
    [("logprobs", 0), ("best_of", 2), ("n", True), ("tool_choice", "auto"), ("stream_options", {}), ("audio", {})],
)
def test_what_looks_harmless_but_asks_for_something_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("json_object", "type"),
        ({}, "type"),
        ({"type": "grammar"}, "type"),
        ({"type": "json_object", "schema": {}}, "schema"),
        ({"type": "text", "json_schema": {}}, "json_schema"),
        ({"type": "json_schema"}, "json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": True}}, "json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}, "json_schema.strict"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "name": 1}}, "json_schema.name"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "more": 1}}, "json_schema.more"),
    ],
)
def test_response_format_is_checked_by_name(value: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(response_format=value)
    assert caught.value.param == f"response_format.{param}"


def test_response_format_becomes_a_form() -> None:
    schema = {"type": "integer"}
    json_schema = {"name": "x", "description": None, "strict": None, "schema": schema}
    parsed = chat(response_format={"type": "json_schema", "json_schema": json_schema})
    assert parsed.request.sampling.structured_outputs == StructuredOutputs(json=schema)
    assert chat(response_format={"type": "text"}).request.sampling.structured_outputs is None


@pytest.mark.parametrize(
    ("field", "hint"), [("max_token", "max_tokens"), ("Temperature", "temperature"), ("stopp", "stop"), ("xyz", None)]
)
def test_an_unknown_field_is_refused_with_the_one_that_may_be_meant(field: str, hint: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**{field: 1})
    assert (caught.value.param, caught.value.hint) == (field, hint and f"Did you mean {hint}?")


def test_every_field_is_documented() -> None:
    page = (Path(__file__).parents[4] / "docs" / "reference" / "rest.md").read_text()
    missing = [name for name in {**CHAT, **COMPLETION, **TOKENIZE} if f"`{name}`" not in page]
    assert not missing


def test_what_is_nested_too_deeply_is_refused_by_name() -> None:
    fits, deep = "[" * 99 + "]" * 99, "[" * 101 + "]" * 101
    for nested, says in ((fits, "expected an object"), (deep, "nested deeper than 100")):
        with pytest.raises(InvalidRequest, match=says) as caught:
            parse_chat(b'{"chat_template_kwargs": %s}' % nested.encode(), ASKED)
        assert caught.value.param == "chat_template_kwargs"
