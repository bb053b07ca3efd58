"""One session's harm stays its own: failing prompts, full queues, clients that never read."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from psycopg import errors

from dbnode.sql.messages import cstring, message
from dbnode.sql.sides import BUFFER_BYTES_MAX
from stratakv.postgres import EmbeddedPostgres
from stratakv.sqlfunctions import install
from tests.integration.sql.harness import FrontThread, ReversingModel, address_in, front_thread
from tests.integration.sql.raw_client import RawClient
from tests.support import eventually

ROW_BYTES = 1000
NUM_ROWS = 50_000
READ_AT_ONCE_BYTES = 256 * 1024


def test_thousands_of_failing_prompts_fail_their_statement_only(url: str, model: ReversingModel) -> None:
    with psycopg.connect(url, autocommit=True) as connection, psycopg.connect(url, autocommit=True) as other:
        with pytest.raises(errors.InvalidParameterValue, match="is wrong"):
            connection.execute(
                """SELECT infer('p' || i, options => '{"fail": "x"}') FROM generate_series(1, 10000) i"""
            )
        for session in (connection, other):
            assert session.execute("SELECT infer('ab')").fetchone() == ("ba",)
    eventually(lambda: model.running == 0)


@pytest.fixture
def narrow(cluster: EmbeddedPostgres, database: str, tmp_path: Path) -> Iterator[FrontThread]:
    """A face that takes few calls at a time."""
    install(cluster.database_url(database), address_in(tmp_path))
    tmp_path.chmod(0o711)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o011)
    with front_thread(cluster, tmp_path, ReversingModel(), calls_waiting_max=8) as running:
        yield running


def test_statement_that_looks_far_ahead_leaves_room_for_others(narrow: FrontThread, database: str) -> None:
    url = narrow.url(database)
    many = """SELECT infer('p' || i, options => '{"delay_s": 0.2}') FROM generate_series(1, 2000) i"""
    with (
        psycopg.connect(url, autocommit=True) as greedy,
        psycopg.connect(url, autocommit=True) as other,
        ThreadPoolExecutor() as pool,
    ):
        waiting = pool.submit(greedy.execute, many.encode())
        eventually(lambda: narrow.model.running == 4)
        for _ in range(3):
            assert other.execute("SELECT infer('ab')").fetchone() == ("ba",)
        assert not waiting.done()
        greedy.cancel_safe(timeout=10)
        with pytest.raises(errors.QueryCanceled):
            waiting.result(20)
    eventually(lambda: narrow.model.running == 0)


def test_client_that_never_reads_holds_a_bounded_buffer(front: FrontThread, url: str, database: str) -> None:
    query = f"SELECT infer('ab') || repeat('x', {ROW_BYTES}) FROM generate_series(1, {NUM_ROWS})"
    with RawClient(front.front.port) as client, psycopg.connect(url, autocommit=True) as other:
        client.log_in(database)
        client.send(message(b"Q", cstring(query)))
        sessions = front.front.relay._sessions
        eventually(lambda: max(_unsent_bytes(session) for session in tuple(sessions)) > BUFFER_BYTES_MAX)
        for _ in range(20):
            assert other.execute("SELECT infer('cd')").fetchone() == ("dc",)
            most = max(_unsent_bytes(session) for session in tuple(sessions))
            assert most <= BUFFER_BYTES_MAX + 2 * READ_AT_ONCE_BYTES
    eventually(lambda: len(front.front.relay._sessions) == 0)


def _unsent_bytes(session: object) -> int:
    transport = session.client.transport  # type: ignore[attr-defined]
    return 0 if transport is None else int(transport.get_write_buffer_size())
