"""sql: infer() over many rows, looked ahead for (ours) against row at a time (the baseline: the same with hints off).

The model is a stand-in that takes 50 ms for an inference and has 64 places; everything else is real: PostgreSQL, the functions,
the relay and the private listener. A client in another process than PostgreSQL measures whole statements.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import uvloop

from benchmarks.harness import Spread, parse_options, report
from dbnode.sql.front import SqlFront
from dbnode.sql.hints import HintStats
from dbnode.sql.service import InferCall
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import PostgresSettings, SqlSettings
from stratakv.sqlfunctions import ListenerAddress, install

INFER_S = 0.05
SLOTS = 64
ROWS = 400
STREAMED_ROWS = 1000
MEMO_ROWS = 20_000
AGGREGATE_S, AGGREGATE_S_QUICK = 60.0, 6.0
AGGREGATED_ROWS = 100
BUDGET_SHARE = SqlSettings().hints_budget_s / AGGREGATE_S
"""A shorter aggregate has a shorter budget, so that the share of it that looking ahead may take is the same."""
RUNS, RUNS_QUICK = 5, 1
START_TIMEOUT_S = 30.0
TABLES = f"""
CREATE TABLE t AS SELECT i, i % 20 AS g, 'row ' || i AS a, 'line ' || i AS b FROM generate_series(1, {ROWS}) i;
CREATE VIEW answers AS SELECT i, b, infer(a) AS answer FROM t;
CREATE FUNCTION nap(seconds float) RETURNS int LANGUAGE plpgsql STABLE AS
    $$BEGIN PERFORM pg_sleep(seconds); RETURN 1; END$$;
ANALYZE t
"""
FIRST = "SELECT infer('once')"
ALL = f"SELECT i, infer('row ' || i) FROM generate_series(1, {ROWS}) i"
DISTINCT = "SELECT infer('row ' || i % 500) FROM generate_series(1, 10000) i"
LIMIT = "SELECT i FROM generate_series(1, 10000) i WHERE infer('row ' || i) = 'yes' LIMIT 20"
STREAMED = f"SELECT i, infer('row ' || i) FROM generate_series(1, {STREAMED_ROWS}) i"
MEMO = f"SELECT count(infer('same')) FROM generate_series(1, {MEMO_ROWS}) i"
AGGREGATE = f"SELECT sum(nap(%f)) AS total FROM generate_series(1, {AGGREGATED_ROWS}) i"
MIXED = {
    "or": "SELECT i FROM t WHERE infer(a) = 'yes' OR infer(b) = 'yes'",
    "and": "SELECT i FROM t WHERE infer(a) IS DISTINCT FROM 'yes' AND infer(b) = 'yes'",
    "case": "SELECT CASE WHEN infer(a) = 'yes' THEN infer('then ' || a) ELSE infer('else ' || b) END FROM t",
    "coalesce": "SELECT coalesce(nullif(infer(a), 'no'), infer(b)) FROM t",
    "not_exists": "SELECT infer(b) FROM t WHERE NOT EXISTS (SELECT FROM t u WHERE u.i = t.i + 1 AND infer(u.a) = 'yes')",
    "not_in": "SELECT infer(b) FROM t WHERE infer(a) NOT IN (SELECT 'yes')",
    "distinct_from": "SELECT infer(b) FROM t WHERE infer(a) IS DISTINCT FROM 'yes'",
    "limit": "SELECT i FROM t WHERE infer(a) = 'yes' LIMIT 20",
    "limit_or": "SELECT infer('s' || a) FROM t WHERE infer(a) = 'yes' OR infer(b) = 'yes' LIMIT 20",
    "view": "SELECT answer FROM answers",
    "view_filter": "SELECT infer(b) FROM answers WHERE answer IS DISTINCT FROM 'yes'",
    "nested": "SELECT infer('again ' || infer(a) || b) FROM t",
    "cte": "WITH c AS (SELECT i, infer(a) AS v FROM t) SELECT infer('c' || i) FROM c WHERE v IS DISTINCT FROM 'yes'",
    "aggregate": "SELECT infer('sum ' || string_agg(infer(a), ',' ORDER BY i)) FROM t GROUP BY g",
}


class StandInModel:
    """Answers `yes` to one prompt of four, after a fixed time, at most SLOTS at once."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._slots = asyncio.Semaphore(SLOTS)

    async def reserve(self, calls: Sequence[InferCall]) -> list[InferCall]:
        return list(calls)

    async def infer_text(self, call: InferCall) -> str:
        self.num_calls += 1
        async with self._slots:
            await asyncio.sleep(INFER_S)
        return "yes" if sum(call.prompt.encode()) % 4 == 0 else "no"


@dataclass(frozen=True, slots=True)
class Face:
    """A running SQL face with its own database."""

    url: str
    front: SqlFront
    model: StandInModel
    cluster: EmbeddedPostgres


@contextmanager
def running_face(
    options: Mapping[str, str] | None = None, *, hints_budget_s: float = SqlSettings().hints_budget_s
) -> Iterator[Face]:
    """PostgreSQL with these settings, and the face on a thread of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="skv-") as directory,
        EmbeddedPostgres(PostgresSettings(), Path(directory) / "pg", throw_away=True, options=options) as cluster,
    ):
        Path(directory).chmod(0o711)
        settings = SqlSettings(port=0, listener_dir=Path(directory), hints_budget_s=hints_budget_s)
        install(cluster.database_url("postgres"), ListenerAddress.from_settings(settings))
        ready = threading.Event()
        stop = asyncio.Event()
        found: list[Any] = []

        async def serve() -> None:
            model = StandInModel()
            front = SqlFront(settings, cluster.url, model, trusted_backend=True, postgres_uid=cluster.uid)
            await front.start()
            found.extend((asyncio.get_running_loop(), front, model))
            ready.set()
            await stop.wait()
            await front.close()

        thread = threading.Thread(target=uvloop.run, args=(serve(),), daemon=True)
        thread.start()
        if not ready.wait(START_TIMEOUT_S):
            raise SystemExit("the SQL face did not start")
        loop, front, model = found
        try:
            yield Face(f"postgresql://postgres@127.0.0.1:{front.port}/postgres", front, model, cluster)
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(START_TIMEOUT_S)


class Measurement:
    """One session through the face."""

    def __init__(self, face: Face, connection: psycopg.Connection[Any]) -> None:
        self._face = face
        self._connection = connection

    def seconds(self, query: str) -> float:
        started_s = time.perf_counter()
        self._connection.execute(query.encode()).fetchall()
        return time.perf_counter() - started_s

    def inferences(self, query: str) -> int:
        before = self._face.model.num_calls
        self._connection.execute(query.encode()).fetchall()
        return self._face.model.num_calls - before

    def stats(self, run: Callable[[], object]) -> HintStats:
        """What the counters grew by."""
        before = replace(self._face.front.hint_stats)
        run()
        self._connection.execute(b"SELECT 1")
        now = self._face.front.hint_stats
        return HintStats(*(getattr(now, name) - getattr(before, name) for name in HintStats.__slots__))

    def first_row_seconds(self, query: str) -> tuple[float, float]:
        """Until the first row is here, and until all are."""
        started_s = time.perf_counter()
        first_s = 0.0
        for _ in self._connection.cursor().stream(query.encode()):
            first_s = first_s or time.perf_counter() - started_s
        return first_s, time.perf_counter() - started_s

    def set(self, name: str, value: str) -> None:
        self._connection.execute(f"SET stratakv.{name} = {value}".encode())

    def execute(self, script: str) -> None:
        self._connection.execute(script.encode())


def measure_rows(session: Measurement, runs: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Hundreds of rows, ours and row at a time."""
    ours, within, baseline, memo = [], [], [], []
    for _ in range(runs):
        session.set("hints", "on")
        ours.append(session.seconds(ALL))
        session.execute("BEGIN")
        within.append(session.seconds(ALL))
        session.execute("ROLLBACK")
        memo.append(MEMO_ROWS / session.seconds(MEMO))
        session.set("hints", "off")
        baseline.append(session.seconds(ALL))
    session.set("hints", "on")
    spread, row_at_a_time = Spread.of(ours), Spread.of(baseline)
    # What the model itself takes at full concurrency; the rest is ours.
    least_s = ROWS / SLOTS * INFER_S
    found = {
        "seconds_400_rows": spread.as_json(),
        "seconds_400_rows_in_transaction": Spread.of(within).as_json(),
        "collect_overhead_share": round((spread.median - least_s) / spread.median, 3),
        "memo_hit_rows_per_s": Spread.of(memo).as_json(0),
        "inferences_500_distinct": session.inferences(DISTINCT),
        "inferences_limit_20": session.inferences(LIMIT),
    }
    ratios = {
        "speedup_400_rows": round(row_at_a_time.median / spread.median, 1),
        "speedup_400_rows_in_transaction": round(row_at_a_time.median / Spread.of(within).median, 1),
    }
    return found, {"seconds_400_rows": row_at_a_time.as_json()}, ratios


def measure_streaming(session: Measurement, runs: int) -> dict[str, Any]:
    """First row against whole. One inference alone is a sixteenth of the whole, so that is told apart."""
    shares, beyond, seconds, unstreamed = [], [], [], []
    for _ in range(runs):
        session.set("stream", "on")
        first_s, whole_s = session.first_row_seconds(STREAMED)
        shares.append(first_s / whole_s)
        beyond.append((first_s - INFER_S) / whole_s)
        seconds.append(first_s)
        session.set("stream", "off")
        first_s, whole_s = session.first_row_seconds(STREAMED)
        unstreamed.append(first_s / whole_s)
    return {
        "first_row_share": Spread.of(shares).as_json(),
        "first_row_share_beyond_one_inference": Spread.of(beyond).as_json(),
        "first_row_seconds": Spread.of(seconds).as_json(),
        "first_row_share_not_streamed": Spread.of(unstreamed).as_json(),
    }


def measure_mixed(face: Face, session: Measurement) -> dict[str, Any]:
    """What was sent in vain, and what the statements had to ask for themselves."""
    before = face.model.num_calls
    stats = {name: session.stats(partial(session.seconds, query)) for name, query in MIXED.items()}
    inferred = face.model.num_calls - before
    distinct = sum(one.distinct for one in stats.values())
    return {
        "wasted_share": round(sum(one.wasted for one in stats.values()) / max(1, distinct), 4),
        "wasted_share_by_statement": {
            name: round(one.wasted / max(1, one.distinct), 3) for name, one in stats.items() if one.wasted
        },
        "final_miss_share": round((inferred - distinct) / inferred, 4),
    }


def measure_aggregate(seconds: float) -> dict[str, Any]:
    """An aggregate that takes so long before the first infer(), against the aggregate alone."""
    with (
        running_face(hints_budget_s=seconds * BUDGET_SHARE) as face,
        psycopg.connect(face.url, autocommit=True) as connection,
    ):
        session = Measurement(face, connection)
        session.execute(TABLES)
        session.seconds(FIRST)
        aggregate = AGGREGATE % (seconds / AGGREGATED_ROWS)
        alone_s = session.seconds(aggregate)
        with_infer_s = session.seconds(f"SELECT infer('total ' || total) FROM ({aggregate}) s")
    return {"aggregate_seconds": round(alone_s, 1), "aggregate_ratio": round(with_infer_s / alone_s, 3)}


def main() -> int:
    options = parse_options(__doc__)
    runs = RUNS_QUICK if options.quick else RUNS
    with (
        running_face() as face,
        psycopg.connect(face.url, autocommit=True) as connection,
    ):
        session = Measurement(face, connection)
        session.execute(TABLES)
        session.seconds(FIRST)
        rows, baseline, ratios = measure_rows(session, runs)
        streaming = measure_streaming(session, runs)
        mixed = measure_mixed(face, session)
    aggregate = measure_aggregate(AGGREGATE_S_QUICK if options.quick else AGGREGATE_S)
    report(
        "sql",
        {"infer_ms": INFER_S * 1e3, "slots": SLOTS, "rows": ROWS, "quick": options.quick, "seed": options.seed},
        rows | streaming | mixed | aggregate,
        baseline,
        ratios,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
