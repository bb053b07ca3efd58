"""Options of infer(): checked by name and type before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from dbnode.sql_inference import OPTIONS, checked_options
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
        ("made_up", None),
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
    }
    assert checked_options({**right, "system": None}) == right
    assert set(right) | {"system"} == OPTIONS
