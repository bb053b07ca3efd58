"""The stream parsers: cut anywhere, they find the same messages; fed anything, they fail only as protocol errors."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnode.sql.errors import MessageTooLong, ProtocolViolation
from dbnode.sql.messages import Kind, MessageReader, Severity, error_response, int32, message, text_row
from stratakv.errors import InvalidRequest

messages = st.lists(st.tuples(st.sampled_from(list(b"QSZDdCPB")), st.binary(max_size=40)), max_size=12)


def _chunks(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


@given(messages, st.lists(st.integers(0, 10_000), max_size=30))
def test_reader_gives_the_same_messages_wherever_the_stream_is_cut(
    parsed: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    reader = MessageReader(1000)
    found = []
    for chunk in _chunks(b"".join(message(bytes((kind,)), payload) for kind, payload in parsed), cuts):
        reader.feed(chunk)
        while (got := reader.next_message()) is not None:
            found.append(got)
    assert found == parsed
    assert reader.take_rest() == b""


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=10))
def test_any_bytes_give_the_same_outcome_in_any_cutting(data: bytes, cuts: list[int]) -> None:
    assert _read([data]) == _read(_chunks(data, cuts))


def _read(chunks: list[bytes]) -> tuple[list[tuple[int, bytes]], bool]:
    reader = MessageReader(50)
    found = []
    try:
        for chunk in chunks:
            reader.feed(chunk)
            while (got := reader.next_message()) is not None:
                found.append(got)
    except ProtocolViolation:
        return found, True
    return found, False


@given(st.integers(51, 400), st.lists(st.integers(0, 1000), max_size=20))
def test_message_over_the_limit_is_skipped_and_the_next_one_is_read(size: int, cuts: list[int]) -> None:
    reader = MessageReader(50, skip_too_long=True)
    outcomes: list[object] = []
    for chunk in _chunks(message(b"Q", bytes(size)) + message(b"Q", b"next"), cuts):
        reader.feed(chunk)
        while True:
            try:
                got = reader.next_message()
            except MessageTooLong:
                outcomes.append("too long")
                continue
            if got is None:
                break
            outcomes.append(got)
    assert outcomes == ["too long", (Kind.QUERY, b"next")]


def test_declared_length_allocates_nothing() -> None:
    reader = MessageReader(50, skip_too_long=True)
    reader.feed(b"Q" + int32(0x7FFFFFFF) + bytes(1000))
    assert reader.next_message() is None
    assert reader.take_rest() == b""


@pytest.mark.parametrize("length", [-(2**31), -1, 0, 3])
def test_impossible_length_is_a_violation(length: int) -> None:
    reader = MessageReader(50)
    reader.feed(b"Q" + int32(length))
    with pytest.raises(ProtocolViolation):
        reader.next_message()


def test_error_carries_state_message_and_hint_and_no_nul() -> None:
    error = InvalidRequest("wrong\0 thing", hint="do it right")
    assert error_response(error, Severity.FATAL)[5:] == (b"SFATAL\0VFATAL\0C22023\0Mwrong thing\0Hdo it right\0\0")


def test_row_has_nulls_where_there_is_nothing() -> None:
    row = text_row([("a", "x"), ("b", None)])
    assert b"D" + int32(4 + 2 + 4 + 1 + 4) + b"\0\2" + int32(1) + b"x" + int32(-1) in row
