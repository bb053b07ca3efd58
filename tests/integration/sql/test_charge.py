"""What was inferred ahead of a statement is charged when the statement asks for it, and else never."""

from __future__ import annotations

import psycopg

from dbnode.charge import Charge
from tests.integration.sql.harness import ReversingModel
from tests.support import eventually

Connection = psycopg.Connection[tuple[object, ...]]


def _decision(charge: Charge | None) -> bool | None:
    """None while there is none."""
    assert charge is not None, "a call made ahead"
    decided: list[bool] = []
    charge.settle(decided.append)
    return decided[0] if decided else None


def test_only_what_the_statement_asked_for_is_charged(connection: Connection, model: ReversingModel) -> None:
    rows = connection.execute(
        "SELECT i FROM generate_series(1, 500) i WHERE infer('row ' || i) LIKE '%' LIMIT 5"
    ).fetchall()
    assert len(rows) == 5
    asked = {f"row {i}" for (i,) in rows}
    assert len(model.calls) > len(asked), "the window is larger than the limit"
    eventually(lambda: all(_decision(call.charge) is not None for call in model.calls), what="all charges decided")
    assert {call.prompt for call in model.calls if _decision(call.charge)} == asked


def test_a_cancelled_statement_is_charged_for_nothing_it_did_not_ask_for(
    connection: Connection, model: ReversingModel
) -> None:
    connection.execute("SET statement_timeout = '300ms'")
    query = """SELECT infer('row ' || i, options => '{"delay_s": 30}') FROM generate_series(1, 20) i"""
    try:
        connection.execute(query)
    except psycopg.errors.QueryCanceled:
        eventually(lambda: all(_decision(call.charge) is not None for call in model.calls), what="all charges decided")
    assert [call.prompt for call in model.calls if _decision(call.charge)] in ([], ["row 1"])


def test_a_call_that_nobody_looked_ahead_for_is_charged_at_once(connection: Connection, model: ReversingModel) -> None:
    connection.execute("SELECT infer('alone')")
    assert [call.charge for call in model.calls] == [None]
