"""The SQL face's metrics: sums that are read when scraped, without names of anything."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from dbnode.sql.front import SqlFront
from dbnode.sql.service import InferCall
from dbnode.sql.statement_meter import MeteredService
from dbnode.sql_metrics import SqlMetrics
from stratakv.errors import InvalidRequest
from stratakv.settings import Secret, SqlSettings


class Refusing:
    async def reserve(self, calls: Sequence[InferCall]) -> list[InferCall]:
        return list(calls)

    async def infer_text(self, call: InferCall) -> str:
        raise InvalidRequest("no")


async def test_what_statements_did_is_told_once_they_have_ended() -> None:
    settings = SqlSettings(listener_key=Secret("k"))
    front = SqlFront(settings, "postgresql://u@127.0.0.1/d", Refusing(), postgres_uid=0)
    registry = CollectorRegistry()
    registry.register(SqlMetrics(front))
    book = front.book
    book.begin("sql-1", "SELECT infer($1)")
    meter = book.called("sql-1", "ada", "d", None)
    for is_known in (True, True, False):
        meter.count_call(is_known=is_known)
    with meter.waiting():
        assert "stratakv_sql_statements_waiting 1.0" in generate_latest(registry).decode()
    call = InferCall("x", None, {}, "ada", "d", "sql-1")
    with pytest.raises(InvalidRequest):
        await MeteredService(Refusing(), book).infer_text(call)
    book.end("sql-1")
    told = generate_latest(registry).decode()
    for line in (
        "stratakv_sql_statements_total 1.0",
        "stratakv_sql_infer_calls_total 3.0",
        "stratakv_sql_memo_hits_total 2.0",
        "stratakv_sql_hints_missed_total 1.0",
        "stratakv_sql_infer_errors_total 1.0",
        "stratakv_sql_statements_running 0.0",
        'stratakv_sql_hints_total{result="wasted"} 0.0',
    ):
        assert line in told
    assert "ada" not in told
