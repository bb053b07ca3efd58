"""Prometheus metrics of the SQL face, read from its own counters whenever somebody scrapes. Registered by `dbnode.service`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dbnode.sql.front import SqlFront
from dbnode.sql.statement_meter import StatementCounts

_BY_RESULT = ("consumed", "wasted")


class SqlMetrics(Collector):
    """Never a role, a database or a statement: those are in `stratakv.statement_stats`."""

    def __init__(self, front: SqlFront) -> None:
        self._front = front

    def describe(self) -> Iterable[Metric]:
        """Nothing is asked for when it is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        front, sums, hints = self._front, self._front.book.sums(), self._front.hint_stats
        running = front.book.running
        yield _gauge("sessions", "Sessions of clients.", front.relay.num_sessions)
        yield _gauge("statements_running", "Statements under way that have called infer().", len(running))
        yield _gauge(
            "statements_waiting", "Those that wait for the model now.", sum(1 for meter in running if meter.num_waiting)
        )
        for name, doc, value in _of_statements(sums):
            yield CounterMetricFamily(f"stratakv_sql_{name}", doc, value=value)
        yield CounterMetricFamily("stratakv_sql_collect_passes", "Passes that looked ahead.", value=hints.passes)
        by_result = CounterMetricFamily(
            "stratakv_sql_hints", "Inferences sent ahead of their statement, by what became of them.", labels=["result"]
        )
        for result in _BY_RESULT:
            by_result.add_metric([result], getattr(hints, result))
        yield by_result


def _of_statements(sums: StatementCounts) -> Iterator[tuple[str, str, float]]:
    yield "statements", "Statements that called infer().", sums.calls
    yield "infer_calls", "Calls of infer() that PostgreSQL made.", sums.infer_calls
    yield "prompts", "Inferences the model was asked for.", sums.distinct_prompts
    yield "memo_hits", "Calls whose answer was waiting, or under way.", sums.memo_hits
    yield "hints_missed", "Calls that looking ahead had not found.", sums.infer_calls - sums.memo_hits
    yield "infer_errors", "Inferences that failed.", sums.errors
    yield "model_wait_seconds", "Time that statements waited for the model.", sums.wait_ms / 1e3


def _gauge(name: str, doc: str, value: float) -> Metric:
    return GaugeMetricFamily(f"stratakv_sql_{name}", doc, value=value)
