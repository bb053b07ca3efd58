"""Traces are read whole or refused with the line that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dbnode.simulation.errors import TraceError
from dbnode.simulation.trace import parse_trace, read_trace


def line(**changed: Any) -> bytes:
    fields = {"timestamp": 1500, "input_length": 1100, "output_length": 7, "hash_ids": [4, 5, 6]}
    return json.dumps(fields | changed).encode()


def test_times_are_seconds_and_only_full_blocks_have_keys() -> None:
    (request,) = parse_trace([line(), b"\n"])
    assert (request.at_s, request.prompt_tokens, request.output_tokens) == (1.5, 1100, 7)
    assert len(request.keys) == 2


def test_the_same_number_is_the_same_block() -> None:
    first, second = parse_trace([line(), line(hash_ids=[4, 9, 6])])
    assert first.keys[0] == second.keys[0]
    assert first.keys[1] != second.keys[1]


def test_requests_come_in_order_of_time() -> None:
    assert [r.at_s for r in parse_trace([line(timestamp=9000), line(timestamp=3000)])] == [3.0, 9.0]


@pytest.mark.parametrize(
    "bad",
    [
        b"{",
        b"[]",
        line(timestamp=-1),
        line(input_length=0),
        line(input_length="many"),
        line(hash_ids=[1]),
        line(hash_ids=[1, 2, 3, 4]),
        line(hash_ids=[-1, 2, 3]),
        b'{"timestamp": 1, "input_length": 5, "output_length": 1}',
    ],
)
def test_an_error_names_its_line(bad: bytes) -> None:
    with pytest.raises(TraceError, match=r"trace, line 3"):
        parse_trace([line(), line(), bad, line()])


def test_an_empty_trace_and_a_missing_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no requests"):
        parse_trace([b""])
    with pytest.raises(TraceError, match="absent"):
        read_trace(tmp_path / "absent.jsonl")
