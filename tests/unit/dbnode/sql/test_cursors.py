"""Statements that open a cursor and fetch from it are told from all others."""

from __future__ import annotations

import pytest

from dbnode.sql.client_batch import Batch, Prepared
from dbnode.sql.cursors import CURSORS_MAX, Declared, Fetched, OpenCursor, OpenCursors, declared, fetched
from dbnode.sql.statements import collectable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DECLARE c CURSOR FOR SELECT 1", Declared("c", "SELECT 1", False)),
        ('declare "C ""x" no scroll cursor without hold for\n SELECT 1', Declared('C "x', "SELECT 1", False)),
        ("DECLARE C BINARY INSENSITIVE SCROLL CURSOR WITH HOLD FOR TABLE t", Declared("c", "TABLE t", True)),
        ("DECLARE c CURSOR", None),
        ("SELECT 'DECLARE c CURSOR FOR SELECT 1'", None),
    ],
)
def test_declare_names_its_query(text: str, expected: Declared | None) -> None:
    assert declared(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FETCH c", Fetched("c", 1)),
        ("FETCH FROM c", Fetched("c", 1)),
        ("fetch next from C;", Fetched("c", 1)),
        ('FETCH FORWARD 100 FROM "C"', Fetched("C", 100)),
        ("FETCH 7 IN c", Fetched("c", 7)),
        ("FETCH ALL c", Fetched("c", None)),
        ("FETCH FORWARD ALL FROM c", Fetched("c", None)),
        ("FETCH PRIOR FROM c", None),
        ("FETCH BACKWARD 3 FROM c", None),
        ("FETCH ABSOLUTE 3 FROM c", None),
        ("MOVE 3 FROM c", None),
    ],
)
def test_fetch_forward_names_cursor_and_rows(text: str, expected: Fetched | None) -> None:
    assert fetched(text) == expected


def test_the_oldest_cursor_is_forgotten_first() -> None:
    target = collectable("SELECT infer(infer(a)) FROM t")
    assert target is not None
    cursor = OpenCursor(Batch(Prepared(b"")), target, 32)
    assert cursor.num_levels == 2
    cursors = OpenCursors()
    for number in range(CURSORS_MAX + 1):
        cursors.put(str(number), cursor)
    assert cursors.get("0") is None
    assert cursors.get(str(CURSORS_MAX)) is cursor
    cursors.clear()
    assert not cursors
