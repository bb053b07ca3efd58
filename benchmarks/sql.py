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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
MEMO_ROWS = 20_000
RUNS, RUNS_QUICK = 5, 1
START_TIMEOUT_S = 30.0
FIRST = "SELECT infer('once')"
ALL = f"SELECT i, infer('row ' || i) FROM generate_series(1, {ROWS}) i"
DISTINCT = "SELECT infer('row ' || i % 500) FROM generate_series(1, 10000) i"
LIMIT = "SELECT i FROM generate_series(1, 10000) i WHERE infer('row ' || i) = 'yes' LIMIT 20"
GOVERNED = "SELECT i FROM generate_series(1, 400) i WHERE infer('a' || i) = 'yes' OR infer('b' || i) = 'yes'"
MEMO = f"SELECT count(infer('same')) FROM generate_series(1, {MEMO_ROWS}) i"


class StandInModel:
    """Answers `yes` to one prompt of four, after a fixed time, at most SLOTS at once."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._slots = asyncio.Semaphore(SLOTS)

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
def running_face(options: Mapping[str, str] | None = None) -> Iterator[Face]:
    """PostgreSQL with these settings, and the face on a thread of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="skv-") as directory,
        EmbeddedPostgres(PostgresSettings(), Path(directory) / "pg", throw_away=True, options=options) as cluster,
    ):
        Path(directory).chmod(0o711)
        settings = SqlSettings(port=0, listener_dir=Path(directory))
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

    def seconds_in_transaction(self, query: str) -> float:
        """Behind a BEGIN."""
        with self._connection.transaction():
            return self.seconds(query)

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

    def hints(self, on: bool) -> None:
        self._connection.execute(b"SET stratakv.hints = on" if on else b"SET stratakv.hints = off")


def main() -> int:
    options = parse_options(__doc__)
    runs = RUNS_QUICK if options.quick else RUNS
    with running_face() as face, psycopg.connect(face.url, autocommit=True) as connection:
        session = Measurement(face, connection)
        session.seconds(FIRST)
        ours, in_transaction, baseline, memo = [], [], [], []
        for _ in range(runs):
            session.hints(on=True)
            ours.append(session.seconds(ALL))
            in_transaction.append(session.seconds_in_transaction(ALL))
            memo.append(MEMO_ROWS / session.seconds(MEMO))
            session.hints(on=False)
            baseline.append(session.seconds(ALL))
        session.hints(on=True)
        distinct = session.inferences(DISTINCT)
        limited = session.inferences(LIMIT)
        before = face.model.num_calls
        ahead = session.stats(lambda: session.seconds(ALL)).distinct
        inferred = face.model.num_calls - before
        governed = session.stats(lambda: session.seconds(GOVERNED))
    spread, row_at_a_time = Spread.of(ours), Spread.of(baseline)
    # What the model itself takes at full concurrency; the rest is ours.
    least_s = ROWS / SLOTS * INFER_S
    report(
        "sql",
        {"infer_ms": INFER_S * 1e3, "slots": SLOTS, "rows": ROWS, "quick": options.quick, "seed": options.seed},
        {
            "seconds_400_rows": spread.as_json(),
            "seconds_400_rows_in_transaction": Spread.of(in_transaction).as_json(),
            "inferences_500_distinct": distinct,
            "inferences_limit_20": limited,
            "final_miss_share": round((inferred - ahead) / inferred, 3),
            "wasted_share": round(governed.wasted / max(1, governed.distinct), 3),
            "memo_hit_rows_per_s": Spread.of(memo).as_json(0),
            "collect_overhead_share": round((spread.median - least_s) / spread.median, 3),
        },
        {"seconds_400_rows": row_at_a_time.as_json()},
        {"speedup_400_rows": round(row_at_a_time.median / spread.median, 1)},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
