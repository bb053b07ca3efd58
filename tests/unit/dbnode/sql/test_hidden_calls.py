"""Which messages are worth a look."""

from __future__ import annotations

import pytest

from dbnode.sql.hidden_calls import HiddenCalls, changes_views


def _known() -> HiddenCalls:
    calls = HiddenCalls()
    names = ["answers", "Best", "two words", "größe"]
    calls.learn([" ".join(name.encode().hex() for name in names), b"kept".hex()], now_s=1.0)
    return calls


@pytest.mark.parametrize(
    "text",
    [
        "SELECT Infer(a) FROM t",
        "SELECT * FROM answers",
        "select 1 from public.ANSWERS,t",
        'SELECT * FROM "Best" b',
        "TABLE größe;",
        "REFRESH MATERIALIZED VIEW kept",
    ],
)
def test_a_statement_that_may_call_is_told(text: str) -> None:
    assert _known().may_call(text.encode())


@pytest.mark.parametrize("text", ["SELECT 1", "SELECT * FROM answers2", "SELECT words FROM two", "SELECT * FROM kept"])
def test_others_are_forwarded(text: str) -> None:
    assert not _known().may_call(text.encode())


def test_what_could_not_be_learned_is_not_asked_for_at_once() -> None:
    calls = _known()
    calls.is_stale = True
    calls.learn([], now_s=2.0)
    assert not calls.is_stale
    assert calls.may_call(b"SELECT * FROM answers")


def test_statements_that_change_views_are_known() -> None:
    assert changes_views(b"Q\0\0\0bCREATE VIEW v AS SELECT infer(a) FROM t\0")
    assert changes_views(b"alter view answers rename to x")
    assert not changes_views(b"SELECT infer(created) FROM t")
