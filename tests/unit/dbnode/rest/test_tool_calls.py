"""Calls are found however the text comes in pieces, and what is no call is told as it was."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnode.rest.tool_calls import CallPiece, CallReader
from dbnode.rest.tools import ToolMode, ToolUse

WEATHER = {"name": "weather", "parameters": {"type": "object"}}
TIME = {"name": "time"}
ARGUMENTS = {"city": 'Paris {"}', "days": [1, {"x": None}]}
BARE = json.dumps({"name": "weather", "parameters": ARGUMENTS})
TAGGED = "<tool_call>\n" + json.dumps({"name": "weather", "arguments": ARGUMENTS}) + "\n</tool_call>"


def read(text: str, cuts: list[int], mode: ToolMode = ToolMode.AUTO, **how: Any) -> tuple[str, list[tuple[str, Any]]]:
    """Text, and calls with their arguments; `text` comes cut at `cuts`."""
    reader = CallReader(ToolUse(mode, (WEATHER, TIME), **how))
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    pieces = [piece for a, b in itertools.pairwise(bounds) for piece in reader.push(text[a:b])]
    pieces += reader.finish()
    calls: dict[int, list[CallPiece]] = {}
    for piece in pieces:
        if isinstance(piece, CallPiece):
            calls.setdefault(piece.index, []).append(piece)
    assert all(parts[0].name and not any(part.name for part in parts[1:]) for parts in calls.values())
    found = [(parts[0].name or "", json.loads("".join(part.arguments for part in parts))) for parts in calls.values()]
    return "".join(piece for piece in pieces if isinstance(piece, str)), found


cuts = st.lists(st.integers(0, 120), max_size=30)
CALL = ("weather", ARGUMENTS)


@given(cuts)
@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        (TAGGED, "", [CALL]),
        (f"Let me see. {TAGGED}", "Let me see. ", [CALL]),
        (f"{TAGGED}\n{TAGGED}\n", "", [CALL, CALL]),
        (f"{TAGGED} That is all.", " That is all.", [CALL]),
        (TAGGED.removesuffix("</tool_call>"), "", [CALL]),
        (BARE, "", [CALL]),
        (f" {BARE}; {BARE}", "", [CALL, CALL]),
        (f"{BARE}\n{TAGGED}", "", [CALL, CALL]),
        (f"{BARE} Done.", "Done.", [CALL]),
        ('{"name": "time"}', "", [("time", {})]),
        ('<tool_call>{"name": "made_up", "arguments": "{}"}</tool_call>', "", [("made_up", {})]),
    ],
)
def test_calls_are_found_wherever_the_text_is_cut(answer: str, text: str, calls: list[Any], cuts: list[int]) -> None:
    assert read(answer, cuts) == (text, calls)


@given(st.text('{}[]"\\<>/tol_ca:n \n', max_size=60), cuts)
def test_what_is_no_call_is_told_as_it_was(answer: str, cuts: list[int]) -> None:
    assert read(answer, cuts) == (answer, [])


@given(cuts)
@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "nobody", "parameters": {}}',
        f"  {{'x'}} {BARE}",
        "<tool_call>not json</tool_call>",
        '<tool_call>{"name": "weather", "arguments": ',
        '{"name": "weather", "arguments": {',
        "a <tool_cal",
    ],
)
def test_what_only_looks_like_a_call_is_text(answer: str, cuts: list[int]) -> None:
    assert read(answer, cuts) == (answer, [])


@given(cuts)
def test_required_calls_are_the_elements_of_a_list(cuts: list[int]) -> None:
    element = json.dumps({"name": "weather", "arguments": ARGUMENTS})
    assert read(f"[{element}, {element}]", cuts, ToolMode.REQUIRED) == ("", [CALL, CALL])
    text, calls = read(f"[{element}, " + element[:20], cuts, ToolMode.REQUIRED)
    assert (text, calls) == (element[:20], [CALL])


@given(cuts)
def test_a_named_call_is_its_arguments(cuts: list[int]) -> None:
    assert read(json.dumps(ARGUMENTS), cuts, ToolMode.NAMED) == ("", [CALL])


@pytest.mark.parametrize("answer", [f"{TAGGED}{TAGGED}", f"{BARE};{BARE}"])
def test_without_parallel_calls_only_the_first_is_told(answer: str) -> None:
    assert read(answer, [], is_parallel=False) == ("", [CALL])
