"""Options of infer() and its kin: checked by name and type before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from dbnode.generate import StructuredOutputs
from dbnode.sql_options import OPTIONS, checked_options, sampling
from stratakv.errors import InvalidRequest


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("temperature", 3),
        ("temperature", "hot"),
        ("top_p", -0.1),
        ("seed", 1.5),
        ("timeout_ms", 0),
        ("timeout_ms", 1.5),
        ("stop", ""),
        ("stop", [1]),
        ("stop", ["x"] * 17),
        ("system", 5),
        ("priority", 0.5),
        ("priority", 2**31),
        ("priority", "high"),
        ("cache_salt", ""),
        ("cache_salt", 5),
        ("cache_salt", "s" * 513),
        ("on_error", "ignore"),
        ("dedupe", 1),
        ("slo_class", "fast"),
        ("slo_class", 1),
        ("on_error", True),
        ("on_error", "detail"),
        ("made_up", None),
        ("json_schema", {}),
        ("choices", ["a"]),
    ],
)
def test_a_wrong_option_is_refused_by_name_as_invalid_parameter_value(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        checked_options({name: value})
    assert caught.value.sqlstate == "22023"
    assert caught.value.param == name


def test_all_wrong_values_are_named_at_once() -> None:
    with pytest.raises(InvalidRequest, match=r"max_tokens.*top_k"):
        checked_options({"max_tokens": 0, "top_k": -1})


def test_right_options_pass_and_nulls_are_defaults() -> None:
    right = {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 1,
        "min_p": 0.0,
        "top_k": 4,
        "seed": 1,
        "stop": "x",
        "timeout_ms": 9,
        "on_error": "null",
        "dedupe": False,
        "priority": -3,
        "cache_salt": "s",
        "slo_class": "interactive",
    }
    assert checked_options({**right, "system": None}) == right
    assert set(right) | {"system"} == OPTIONS


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"@choices": []}, "choices"),
        ({"@choices": ["a", None]}, "choices"),
        ({"@choices": ["a", ""]}, "choices"),
        ({"@choices": [["a"]]}, "choices"),
        ({"@choices": ["a"] * 1001}, "choices"),
        ({"@choices": "a"}, "choices"),
        ({"@json_schema": []}, "schema"),
        ({"@json_schema": True}, "schema"),
        ({"@choices": ["a"], "stop": "x"}, "stop"),
        ({"@choices": ["a"], "@json_schema": {}}, "@choices"),
        ({"@choices": ["a"], "on_error": "detail"}, "on_error"),
        ({"@made_up": 1}, "@made_up"),
    ],
)
def test_what_a_typed_function_cannot_do_is_refused_by_name(options: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match=param) as caught:
        checked_options(options)
    assert caught.value.param == param
    assert caught.value.sqlstate == "22023"


def test_form_goes_to_the_worker_as_it_is_written() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    options = checked_options({"@json_schema": schema, "on_error": "detail"})
    assert sampling(options).structured_outputs == StructuredOutputs(json=schema)
    assert sampling(checked_options({"@choices": ["a"]})).structured_outputs == StructuredOutputs(choice=["a"])
    assert sampling(checked_options({})).structured_outputs is None
