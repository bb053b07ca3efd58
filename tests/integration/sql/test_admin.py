"""The admin database: SHOW commands over any driver, after PostgreSQL's own login, each role its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import asyncpg
import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row

from dbnode.sql.admin.login import check_name
from dbnode.sql.messages import cstring, message
from stratakv.errors import SetupError
from stratakv.postgres import EmbeddedPostgres
from tests.integration.sql.harness import FrontThread
from tests.integration.sql.raw_client import RawClient, startup
from tests.support import eventually

ADMIN = "stratakv_admin"
ASKED_BYTES_MAX = 64 * 1024 * 1024
SHOWS = ("CLIENTS", "SERVERS", "POOLS", "STATEMENTS", "STATS", "VERSION", "HELP")


@pytest.fixture
def plain_role(cluster: EmbeddedPostgres) -> Iterator[str]:
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE ROLE admin_ada LOGIN")
        yield "admin_ada"
        connection.execute("DROP ROLE admin_ada")


def show(front: FrontThread, what: str, user: str = "postgres", **options: Any) -> list[dict[str, Any]]:
    with psycopg.connect(front.url(ADMIN, user), autocommit=True, row_factory=dict_row, **options) as connection:
        return connection.execute(f"SHOW {what}".encode()).fetchall()


@pytest.mark.parametrize("what", SHOWS)
def test_every_table_by_the_simple_and_the_extended_protocol(front: FrontThread, what: str) -> None:
    assert show(front, what) is not None
    assert show(front, f"{what.lower()} ;", cursor_factory=psycopg.ClientCursor) is not None
    with psycopg.connect(front.url(ADMIN), autocommit=True, prepare_threshold=0) as connection:
        for _ in range(2):
            cursor = connection.cursor(binary=True)
            columns = cursor.execute(f"SHOW {what}".encode()).description
            assert columns is not None
            assert all(len(row) == len(columns) for row in cursor.fetchall())


async def test_asyncpg_reads_it(front: FrontThread) -> None:
    connection = await asyncpg.connect(front.url(ADMIN))
    try:
        [row] = await connection.fetch("SHOW VERSION")
        assert row["version"].startswith("StrataKV ")
        assert len(await connection.fetch("SHOW HELP")) == len(SHOWS)
    finally:
        await connection.close()


def test_sessions_are_shown_with_their_backends(front: FrontThread, url: str, database: str) -> None:
    with psycopg.connect(url, autocommit=True, application_name="the test") as connection:
        connection.execute("SELECT 1")
        pid = connection.info.backend_pid
        [client] = [row for row in show(front, "CLIENTS") if row["database"] == database]
        assert (client["type"], client["user"], client["application_name"]) == ("C", "postgres", "the test")
        assert (client["remote_pid"], client["addr"], client["state"]) == (pid, "127.0.0.1", "idle")
        [server] = [row for row in show(front, "SERVERS") if row["database"] == database]
        assert (server["remote_pid"], server["link"], server["id"]) == (pid, client["id"], client["link"])
        [pool] = [row for row in show(front, "POOLS") if row["database"] == database]
        assert (pool["cl_active"], pool["sv_idle"], pool["pool_mode"]) == (1, 1, "session")
        [sums] = [row for row in show(front, "STATS") if row["database"] == database]
        assert sums["total_query_count"] == 1
        assert sums["total_received"] > 0
        assert sums["total_sent"] > 0
    eventually(lambda: all(row["database"] != database for row in show(front, "CLIENTS")))


def test_a_running_statement_shows_how_far_it_is_and_no_literal(front: FrontThread, url: str, database: str) -> None:
    def run() -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            query = """SELECT infer('secret ' || i, options => '{"delay_s": 0.2}') FROM generate_series(1, 200) i"""
            connection.execute(query).fetchall()

    thread = threading.Thread(target=run)
    thread.start()
    seen: list[dict[str, Any]] = []

    def is_under_way() -> bool:
        seen[:] = [row for row in show(front, "STATEMENTS") if row["database"] == database]
        return bool(seen) and 0 < seen[0]["prompts_done"] < seen[0]["prompts_total"]

    eventually(is_under_way)
    thread.join()
    assert seen[0]["prompts_total"] == 200
    assert seen[0]["state"] == "waiting"
    assert seen[0]["role"] == "postgres"
    assert seen[0]["query"] == "SELECT infer($1 || i, options => $2) FROM generate_series($3, $4) i"
    eventually(lambda: all(row["database"] != database for row in show(front, "STATEMENTS")))


def test_a_plain_role_sees_what_is_its_own(front: FrontThread, url: str, plain_role: str) -> None:
    own = url.replace("postgres@", f"{plain_role}@")
    with psycopg.connect(url) as other, psycopg.connect(own) as mine:
        assert {row["user"] for row in show(front, "CLIENTS", plain_role)} == {plain_role}
        assert {row["user"] for row in show(front, "POOLS", plain_role)} == {plain_role}
        assert {row["remote_pid"] for row in show(front, "SERVERS", plain_role)} == {mine.info.backend_pid}
        assert other.info.backend_pid in {row["remote_pid"] for row in show(front, "CLIENTS")}
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="pg_monitor"):
            show(front, "STATS", plain_role)
        with psycopg.connect(front.url("postgres"), autocommit=True) as admin:
            admin.execute(sql.SQL("GRANT pg_monitor TO {}").format(sql.Identifier(plain_role)))
        assert {row["user"] for row in show(front, "CLIENTS", plain_role)} >= {plain_role, "postgres"}


def test_no_startup_option_makes_a_role_see_more(front: FrontThread, url: str, plain_role: str) -> None:
    with psycopg.connect(url):
        assert show(front, "CLIENTS", plain_role, options="-c search_path=pg_temp,public") == []
        with pytest.raises(psycopg.OperationalError, match="permission denied"):
            show(front, "CLIENTS", plain_role, options="-c role=postgres")


def test_what_is_no_show_is_refused_and_the_session_goes_on(front: FrontThread) -> None:
    with psycopg.connect(front.url(ADMIN), autocommit=True) as connection:
        for statement in ("SELECT 1", "SHOW ALL THINGS", "SHOW work_mem", "RELOAD", "SET x = 1", "SHOW 'CLIENTS"):
            with pytest.raises(psycopg.errors.FeatureNotSupported, match=r"SHOW|cannot be read"):
                connection.execute(statement.encode())
        with pytest.raises(psycopg.errors.FeatureNotSupported):
            connection.execute("SHOW %s", (1,))
        assert connection.execute("SHOW VERSION").fetchone() is not None
        assert connection.execute("").description is None
    with psycopg.connect(front.url(ADMIN)) as connection, pytest.raises(psycopg.errors.FeatureNotSupported):
        connection.execute("SHOW VERSION")  # BEGIN comes first


def test_its_connection_to_postgresql_ends_after_the_login(front: FrontThread, cluster: EmbeddedPostgres) -> None:
    with psycopg.connect(front.url(ADMIN), autocommit=True) as connection:
        connection.execute("SHOW VERSION")
        pid = connection.info.backend_pid
        with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as other:

            def is_gone() -> bool:
                row = other.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", (pid,)).fetchone()
                return row == (0,)

            eventually(is_gone)
        assert connection.execute("SHOW VERSION").fetchone() is not None
        connection.cancel_safe()
        assert connection.execute("SHOW VERSION").fetchone() is not None


def test_malformed_bytes_end_only_that_session(front: FrontThread) -> None:
    for data in (b"Q\0\0\0\1", b"Q\x7f\xff\xff\xff", b"B\0\0\0\6ab", b"P\0\0\0\5a"):
        with RawClient(front.settings.port) as client:
            client.send(startup(ADMIN))
            client.read_until(b"Z\0\0\0\5I")
            client.send(data)
            assert b"08P01" in client.read_all()
    assert show(front, "VERSION")


def test_a_client_that_reads_nothing_is_not_answered_without_end(front: FrontThread) -> None:
    query = message(b"Q", cstring("SHOW HELP;" * 16))
    with RawClient(front.settings.port) as client, RawClient(front.settings.port) as other:
        client.send(startup(ADMIN))
        client.read_until(b"Z\0\0\0\5I")
        sent = 0
        client.socket.settimeout(0.5)
        with suppress(TimeoutError):
            while sent < ASKED_BYTES_MAX:
                client.send(query * 10)
                sent += len(query) * 10
        assert sent < ASKED_BYTES_MAX
        other.send(startup(ADMIN) + query)
        assert other.read_until(b"Z\0\0\0\5I")
    eventually(lambda: all(session.console is None for session in front.front.relay.sessions))


async def test_a_name_that_is_taken_is_refused_at_the_start(cluster: EmbeddedPostgres) -> None:
    url = cluster.database_url("postgres")
    with pytest.raises(SetupError, match="has a database postgres"):
        await check_name(url, "postgres")
    await check_name(url, ADMIN)
    await check_name(url, "")
    await check_name("postgresql://nobody@127.0.0.1:1/none", "postgres")
