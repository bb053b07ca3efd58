"""Both walkers: wherever the stream is cut they find the same messages, and fail only as protocol violations."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dbnode.sql.errors import ProtocolViolation
from dbnode.sql.messages import Kind, int32, message
from dbnode.sql.walker import MessageWalker, PythonWalker, make_walker
from stratakv import _native

WATCHED = bytes((Kind.READY_FOR_QUERY, Kind.QUERY, Kind.SYNC))
MAKERS = [
    pytest.param(lambda: PythonWalker(WATCHED), id="python"),
    pytest.param(
        lambda: make_walker(WATCHED),
        id="native",
        marks=pytest.mark.skipif(_native.message_walker() is None, reason="the C++ module was not built"),
    ),
]
Make = Callable[[], MessageWalker]
either = pytest.mark.parametrize("make", MAKERS)
messages = st.lists(st.tuples(st.sampled_from(list(b"QSZDdCPB")), st.binary(max_size=40)), max_size=12)


def _bytes_of(parsed: list[tuple[int, bytes]]) -> bytes:
    return b"".join(
        message(bytes((kind,)), payload or (b"I" if kind == Kind.READY_FOR_QUERY else b"")) for kind, payload in parsed
    )


def _chunks(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


@either
@given(parsed=messages, cuts=st.lists(st.integers(0, 10_000), max_size=30))
@example(parsed=[(ord("Z"), b"T"), (ord("D"), b""), (ord("Z"), b"E")], cuts=list(range(20)))
def test_the_same_messages_are_found_wherever_the_stream_is_cut(
    make: Make, parsed: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    walker = make()
    ends = {0, *itertools.accumulate(len(_bytes_of([one])) for one in parsed)}
    found: list[int] = []
    position = 0
    for chunk in _chunks(_bytes_of(parsed), cuts):
        found += walker.feed(chunk)
        position += len(chunk)
        assert walker.at_boundary == (position in ends)
    assert found == [kind for kind, _ in parsed if kind in WATCHED]
    assert walker.at_boundary
    statuses = [(payload or b"I")[0] for kind, payload in parsed if kind == Kind.READY_FOR_QUERY]
    assert walker.transaction_status == (statuses[-1] if statuses else 0)
    assert walker.was_idle == (ord("I") in statuses)
    assert walker.last_kind == (parsed[-1][0] if parsed else 0)


@either
@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=10))
def test_any_bytes_give_the_same_outcome_in_any_cutting(make: Make, data: bytes, cuts: list[int]) -> None:
    assert _walk(make(), [data]) == _walk(make(), _chunks(data, cuts))


@pytest.mark.skipif(_native.message_walker() is None, reason="the C++ module was not built")
@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=10))
def test_both_agree_on_any_bytes(data: bytes, cuts: list[int]) -> None:
    ours, other = make_walker(WATCHED), PythonWalker(WATCHED)
    for chunk in _chunks(data, cuts):
        try:
            found = list(other.feed(chunk))
        except ProtocolViolation:
            with pytest.raises(ProtocolViolation):
                ours.feed(chunk)
            return
        assert list(ours.feed(chunk)) == found
        assert (ours.at_boundary, ours.was_idle, ours.last_kind, ours.transaction_status) == (
            other.at_boundary,
            other.was_idle,
            other.last_kind,
            other.transaction_status,
        )


def _walk(walker: MessageWalker, chunks: list[bytes]) -> tuple[list[int], bool]:
    found: list[int] = []
    try:
        for chunk in chunks:
            found += walker.feed(chunk)
    except ProtocolViolation:
        return [], True  # what was found before the violation depends on the cutting
    return found, False


@either
@pytest.mark.parametrize("length", [-(2**31), -1, 0, 3, 1 << 30, 2**31 - 1])
def test_an_impossible_length_is_a_violation(make: Make, length: int) -> None:
    with pytest.raises(ProtocolViolation, match="invalid message length"):
        make().feed(b"Q" + int32(length))


@either
def test_what_its_owner_sets_stays_until_the_next_message(make: Make) -> None:
    walker = make()
    walker.feed(message(b"Z", b"I"))
    walker.was_idle = False
    walker.transaction_status = ord("E")
    walker.feed(message(b"D", b"x"))
    assert (walker.was_idle, walker.transaction_status) == (False, ord("E"))
