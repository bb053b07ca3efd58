"""Clients of every kind get through the relay what they get without it."""

from __future__ import annotations

import asyncio
import subprocess
from concurrent.futures import ThreadPoolExecutor

import asyncpg
import psycopg
import pytest
from psycopg import errors

from tests.integration.sql.harness import FrontThread, ReversingModel

NUM_CLIENTS = 50


def test_fifty_clients_at_once_all_get_their_answers(url: str, model: ReversingModel) -> None:
    def ask(number: int) -> list[tuple[object, ...]]:
        with psycopg.connect(url) as connection:
            query = """SELECT infer(%s || i, options => '{"delay_s": 0.01}') FROM generate_series(1, 3) i"""
            return connection.execute(query, (f"c{number}-",)).fetchall()

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        found = list(pool.map(ask, range(NUM_CLIENTS)))
    assert found == [[(f"c{number}-{i}"[::-1],) for i in (1, 2, 3)] for number in range(NUM_CLIENTS)]
    assert len(model.calls) == 3 * NUM_CLIENTS


def test_pipeline_mode_keeps_order_and_survives_an_error(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection, connection.pipeline() as pipeline:
        first = connection.execute("SELECT infer('ab')")
        second = connection.execute("SELECT 2")
        pipeline.sync()
        broken = connection.execute("SELECT 1/0")
        with pytest.raises(errors.DivisionByZero):
            pipeline.sync()
        third = connection.execute("SELECT infer('cd')")
        assert (first.fetchone(), second.fetchone(), third.fetchone()) == (("ba",), (2,), ("dc",))
        assert broken.statusmessage is None


def test_copy_goes_both_ways(url: str) -> None:
    rows = [(i, f"text {i}" * 20) for i in range(20_000)]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE t (i int, body text)")
        with connection.cursor().copy("COPY t FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        with connection.cursor().copy("COPY (SELECT i, infer(body) FROM t WHERE i < 2 ORDER BY i) TO STDOUT") as copy:
            assert [bytes(line) for line in copy] == [f"{i}\t{body[::-1]}\n".encode() for i, body in rows[:2]]
        with connection.cursor().copy("COPY t TO STDOUT (FORMAT binary)") as copy:
            copy.set_types(["int4", "text"])
            assert list(copy.rows()) == rows


def test_refused_copy_leaves_the_session_usable(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE t (i int)")
        with pytest.raises(errors.InvalidTextRepresentation), connection.cursor().copy("COPY t FROM STDIN") as copy:
            copy.write("no number\n")
        assert connection.execute("SELECT infer('ab')").fetchone() == ("ba",)


def test_notifications_arrive(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as listener, psycopg.connect(url, autocommit=True) as sender:
        listener.execute("LISTEN news")
        sender.execute("NOTIFY news, 'hello'")
        listener.execute("SELECT infer('ab')")
        assert [note.payload for note in listener.notifies(timeout=10, stop_after=1)] == ["hello"]


def test_binary_results_and_parameters_are_untouched(url: str) -> None:
    with psycopg.connect(url) as connection:
        cursor = connection.cursor(binary=True)
        value = bytes(range(256)) * 5000
        assert cursor.execute("SELECT %b::bytea, 7::int8, infer('ab')", (value,)).fetchone() == (value, 7, "ba")


def test_slow_reader_gets_everything_and_memory_stays_bounded(url: str) -> None:
    with psycopg.connect(url) as connection:
        cursor = connection.cursor()
        total = 0
        for (text,) in cursor.stream("SELECT repeat('x', 100000) FROM generate_series(1, 500)"):
            total += len(text)
        assert total == 100_000 * 500


def test_server_parameters_and_notices_come_through(url: str) -> None:
    notices: list[str | None] = []
    with psycopg.connect(url, autocommit=True, application_name="my app") as connection:
        connection.add_notice_handler(lambda diagnostic: notices.append(diagnostic.message_primary))
        assert connection.info.parameter_status("application_name") == "my app"
        connection.execute("SET TimeZone = 'Asia/Tokyo'; DO $$ BEGIN RAISE NOTICE 'hear'; END $$")
        assert connection.info.parameter_status("TimeZone") == "Asia/Tokyo"
    assert notices == ["hear"]


async def test_asyncpg_gets_answers(url: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        assert await connection.fetchval("SELECT infer($1)", "abc") == "cba"
        async with connection.transaction():
            rows = [row async for row in connection.cursor("SELECT infer('r' || i) FROM generate_series(1, 3) i")]
        assert [row[0] for row in rows] == ["1r", "2r", "3r"]
        with pytest.raises(asyncpg.InvalidParameterValueError):
            await connection.fetchval("""SELECT infer('a', options => '{"fail": "x"}')""")
        with pytest.raises(TimeoutError):
            await connection.fetchval("""SELECT infer('a', options => '{"delay_s": 30}')""", timeout=0.3)
        assert await connection.fetchval("SELECT infer('ab')") == "ba"
    finally:
        await connection.close()


async def test_many_asyncpg_clients_share_the_relay(url: str) -> None:
    async with asyncpg.create_pool(url, min_size=10, max_size=10) as pool:
        answers = await asyncio.gather(*(pool.fetchval("SELECT infer($1)", f"p{i}") for i in range(100)))
    assert answers == [f"p{i}"[::-1] for i in range(100)]


def test_replication_connection_is_relayed(front: FrontThread) -> None:
    done = subprocess.run(
        ["psql", f"{front.url('postgres')}?replication=database", "-XAtc", "IDENTIFY_SYSTEM"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip().endswith("|postgres")
