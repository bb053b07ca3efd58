"""A client's batch is found whole however it is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnode.sql.client_batch import (
    HELD_BYTES_MAX,
    PREPARED_MAX,
    Batch,
    BatchReader,
    Prepared,
    PreparedStatements,
    Readiness,
    Resumed,
    bound_statement,
)
from dbnode.sql.hidden_calls import HiddenCalls
from dbnode.sql.messages import cstring, int16, int32, message

QUERY = "SELECT infer($1) FROM t"
VALUES = int16(1) + int16(1) + int16(2) + int32(3) + b"a\0b" + int32(-1)
PARSE = message(b"P", cstring("s") + cstring(QUERY) + int16(1) + int32(25))
BIND = message(b"B", cstring("") + cstring("s") + VALUES + int16(1) + int16(1))
DESCRIBE, SYNC, FLUSH = message(b"D", b"Ss\0"), message(b"S"), message(b"H")
EXECUTE = message(b"E", cstring("") + int32(0))
PREPARED = Prepared(QUERY.encode(), int16(1) + int32(25))


@given(st.sets(st.integers(1, 200)), st.booleans())
def test_a_batch_is_the_same_however_it_is_cut(cuts: set[int], is_simple: bool) -> None:
    whole = message(b"Q", cstring(QUERY)) if is_simple else PARSE + DESCRIBE + BIND + EXECUTE + SYNC
    marks = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    reader = BatchReader(PreparedStatements(HiddenCalls().may_call))
    found = [reader.feed(whole[a:b]) for a, b in pairwise(marks)]
    assert found == [Readiness.INCOMPLETE] * (len(found) - 1) + [Readiness.COMPLETE]
    assert reader.batch == (Batch(Prepared(QUERY.encode())) if is_simple else Batch(PREPARED, VALUES))
    assert reader.held == whole


def test_a_prepared_statement_is_remembered() -> None:
    known = PreparedStatements(HiddenCalls().may_call)
    assert BatchReader(known).feed(PARSE + DESCRIBE + SYNC) is Readiness.FORWARD
    reader = BatchReader(known)
    assert reader.feed(BIND + EXECUTE + SYNC) is Readiness.COMPLETE
    assert reader.batch == Batch(PREPARED, VALUES)


def test_a_described_statement_may_be_bound_next() -> None:
    known = PreparedStatements(HiddenCalls().may_call)
    assert BatchReader(known).feed(PARSE + DESCRIBE + FLUSH) is Readiness.DESCRIBED
    assert bound_statement(BIND) == b"s"
    assert b"s" in known


@given(
    st.sets(st.integers(1, 200)), st.sampled_from(["BEGIN", "begin isolation level serializable;", "START TRANSACTION"])
)
def test_what_only_begins_a_transaction_is_told_from_the_statement(cuts: set[int], text: str) -> None:
    begin = message(b"P", cstring("") + cstring(text) + int16(0)) + message(b"B", cstring("") * 2 + int16(0) * 3)
    begin += message(b"D", b"P\0") + EXECUTE
    whole = begin + PARSE + BIND + EXECUTE + SYNC
    marks = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    reader = BatchReader(PreparedStatements(HiddenCalls().may_call))
    found = [reader.feed(whole[a:b]) for a, b in pairwise(marks)]
    assert found == [Readiness.INCOMPLETE] * (len(found) - 1) + [Readiness.COMPLETE]
    assert (reader.opening_bytes, reader.batch) == (len(begin), Batch(PREPARED, VALUES))


@pytest.mark.parametrize(
    "data",
    [
        BIND + EXECUTE + SYNC,
        PARSE + BIND + EXECUTE + BIND + EXECUTE + SYNC,
        PARSE + BIND + EXECUTE + EXECUTE + SYNC,
        PARSE + BIND + FLUSH,
        PARSE + FLUSH,
        PARSE + DESCRIBE + FLUSH + BIND,
        PARSE + SYNC,
        PARSE + BIND + SYNC,
        PARSE + message(b"Q", cstring(QUERY)),
        PARSE + message(b"d", b"copy data"),
        PARSE + message(b"B", b"no NUL") + EXECUTE + SYNC,
        PARSE + message(b"B", b"\0s\0" + int16(1)) + EXECUTE + SYNC,
        PARSE + message(b"C", b"Ss\0") + BIND + EXECUTE + SYNC,
        b"P" + int32(2),
        b"P" + int32(HELD_BYTES_MAX + 1),
    ],
)
def test_everything_else_is_forwarded(data: bytes) -> None:
    reader = BatchReader(PreparedStatements(HiddenCalls().may_call))
    assert reader.feed(data) is Readiness.FORWARD
    assert reader.held == data


def test_a_portal_read_in_parts_is_told() -> None:
    reader = BatchReader(PreparedStatements(HiddenCalls().may_call))
    reader.feed(PARSE + BIND + message(b"E", cstring("") + int32(10)) + SYNC)
    assert reader.batch == Batch(PREPARED, VALUES, num_rows=10)


def test_a_portal_read_on_is_told() -> None:
    reader = BatchReader(PreparedStatements(HiddenCalls().may_call))
    assert reader.feed(message(b"E", cstring("p") + int32(10)) + SYNC) is Readiness.COMPLETE
    assert reader.batch == Resumed(b"p", 10)


def test_only_so_many_statements_are_remembered() -> None:
    known = PreparedStatements(HiddenCalls().may_call)
    for number in range(PREPARED_MAX + 1):
        known.put(b"%d" % number, PREPARED)
    assert b"0" not in known
    assert b"%d" % PREPARED_MAX in known
    known.put(b"1", Prepared(b"SELECT 1"))
    assert b"1" not in known


@given(st.binary(max_size=60))
def test_no_bytes_raise(data: bytes) -> None:
    BatchReader(PreparedStatements(HiddenCalls().may_call)).feed(PARSE + data)
    bound_statement(data)
