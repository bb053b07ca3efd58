"""Somebody tries to see in stratakv.statement_stats what others have asked, of other roles, tenants and clusters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import psycopg
import pytest

from dbnode.sql.service import Login
from dbnode.sql.statement_meter import StatementCounts, StatementKey
from dbnode.statement_stats import StatementStats
from stratakv import migrate
from stratakv.errors import PermissionDenied
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import DatabaseSettings, Secret
from stratakv.sqlfunctions import install
from tests.integration.sql.harness import FrontThread, ReversingModel, address_in, front_thread

ROLES = ("peek_victim", "peek_thief", "peek_team")
MAP = """
    INSERT INTO stratakv.tenants (name) VALUES ('victim'), ('thief');
    INSERT INTO stratakv.tenant_roles (cluster, role_name, role_oid, tenant_id)
        SELECT c.system_identifier::text, r.rolname, r.oid, t.id FROM pg_control_system() c, pg_roles r, stratakv.tenants t
        WHERE r.rolname = 'peek_' || t.name;
"""
ELSEWHERE = Login("peek_thief", 999, "1", caller_oid=999)
"""A role of the same name in another cluster."""


@pytest.fixture
def meta_url(cluster: EmbeddedPostgres) -> Iterator[str]:
    """Metadata with two tenants and a role of each, and a role that both may set."""
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE peek_meta")
        for role in ROLES:
            admin.execute(f"CREATE ROLE {role} LOGIN".encode())
        admin.execute("GRANT peek_team TO peek_victim, peek_thief")
        url = cluster.database_url("peek_meta")
        migrate.upgrade(url)
        with psycopg.connect(url) as connection:
            connection.execute(MAP.encode())
        yield url
        admin.execute("DROP DATABASE peek_meta WITH (FORCE)")
        for role in ROLES:
            admin.execute(f"DROP ROLE {role}".encode())


@pytest.fixture
def front(cluster: EmbeddedPostgres, meta_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontThread]:
    directory = tmp_path_factory.mktemp("skv")
    directory.chmod(0o711)
    for parent in directory.parents:
        with suppress(PermissionError):
            parent.chmod(parent.stat().st_mode | 0o111)
    stats = StatementStats(DatabaseSettings(url=Secret(meta_url)), lambda: None)
    stats.add(StatementKey("peek_thief", "d", ELSEWHERE, "SELECT infer(elsewhere)"), StatementCounts(calls=1))
    with front_thread(cluster, directory, ReversingModel(), statements=stats, topics=stats.topics()) as thread:
        yield thread
        thread.run(stats.close())


@pytest.fixture
def database(cluster: EmbeddedPostgres, front: FrontThread) -> Iterator[str]:
    """With the functions; the victim has asked, as itself and as the team."""
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE peek")
        install(cluster.database_url("peek"), address_in(front.settings.listener_dir))  # type: ignore[arg-type]
        with psycopg.connect(front.url("peek", "peek_victim"), autocommit=True) as connection:
            connection.execute("SELECT infer('x') AS of_the_victim")
            connection.execute("SET ROLE peek_team")
            connection.execute("SELECT infer('x') AS of_the_team")
        yield "peek"
        admin.execute("DROP DATABASE peek WITH (FORCE)")


SEEN = "SELECT query FROM stratakv.statement_stats ORDER BY query"


def seen(url: str, *before: str, query: str = SEEN) -> list[object]:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in before:
            connection.execute(statement.encode())
        return [row[0] for row in connection.execute(query.encode()).fetchall()]


def test_each_tenant_sees_its_own_also_of_a_role_that_it_shares(front: FrontThread, database: str) -> None:
    victim, thief = front.url(database, "peek_victim"), front.url(database, "peek_thief")
    assert seen(victim) == ["SELECT infer($1) AS of_the_victim"]
    assert seen(victim, "SET ROLE peek_team") == ["SELECT infer($1) AS of_the_team"]
    assert seen(thief, "SET ROLE peek_team", "SELECT infer('y')") == ["SELECT infer($1)"]
    assert seen(thief) == []
    assert seen(front.url(database, "peek_team")) == []  # logs in for no tenant


@pytest.mark.parametrize("is_direct", [False, True], ids=["relay", "direct"])
def test_views_functions_and_search_paths_of_others_tell_nothing(
    cluster: EmbeddedPostgres, front: FrontThread, database: str, is_direct: bool
) -> None:
    direct = cluster.database_url(database)
    with psycopg.connect(direct, autocommit=True) as admin:
        admin.execute("GRANT CREATE ON SCHEMA public TO peek_victim, peek_thief")
    with psycopg.connect(front.url(database, "peek_victim"), autocommit=True) as connection:
        connection.execute("CREATE VIEW victims_view AS SELECT * FROM stratakv.statement_stats")
        connection.execute(
            "CREATE FUNCTION victims_function() RETURNS SETOF text LANGUAGE sql SECURITY DEFINER"
            " RETURN (SELECT string_agg(query, ',') FROM stratakv.statement_stats)"
        )
        connection.execute("GRANT SELECT ON victims_view TO PUBLIC")
    thief = direct.replace("postgres@", "peek_thief@", 1) if is_direct else front.url(database, "peek_thief")
    assert seen(thief, query="SELECT query FROM victims_view") == []
    assert seen(thief, query="SELECT victims_function()") == [None]
    tricks = (
        "CREATE FUNCTION public.pg_has_role(name, text, text) RETURNS boolean LANGUAGE sql RETURN true",
        "CREATE FUNCTION public.sql_caller() RETURNS text LANGUAGE sql RETURN 'peek_victim'",
        "SET search_path = public, stratakv, pg_catalog",
    )
    assert seen(thief, *tricks) == []


def test_the_question_cannot_be_put_in_anothers_name(front: FrontThread, database: str) -> None:
    victim, thief = b"peek_victim".hex(), b"peek_thief".hex()
    with psycopg.connect(front.url(database, "peek_thief"), autocommit=True) as connection:
        for call in (
            """stratakv.sql_ask_node('statements', '{"all": true}')""",
            f"stratakv.sql_call('ask 1 {victim}:1:{thief}:1 {victim} statements =e30=')",
            "stratakv.sql_call('statements 1 -')",
            "stratakv_dblink.dblink_send_query('x', 'poll')",
            "(SELECT conninfo FROM stratakv.sql_listeners)",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(f"SELECT {call}".encode())
        for setting in ("SET ROLE peek_victim", "SET SESSION AUTHORIZATION peek_victim"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(setting.encode())


def test_another_role_that_comes_to_a_name_starts_with_nothing(
    cluster: EmbeddedPostgres, front: FrontThread, database: str
) -> None:
    url = front.url(database, "peek_reborn")
    with psycopg.connect(cluster.database_url(database), autocommit=True) as admin:
        admin.execute("CREATE ROLE peek_reborn LOGIN")
        try:
            assert seen(url, "SELECT infer('x') AS first") == ["SELECT infer($1) AS first"]
            admin.execute("DROP ROLE peek_reborn; CREATE ROLE peek_reborn LOGIN")
            assert seen(url) == []
            assert seen(url, "SELECT infer('x') AS second") == ["SELECT infer($1) AS second"]
            admin.execute("ALTER ROLE peek_team RENAME TO peek_other; ALTER ROLE peek_reborn RENAME TO peek_team")
            assert seen(front.url(database, "peek_team")) == []
        finally:
            admin.execute("ALTER ROLE peek_team RENAME TO peek_reborn; ALTER ROLE peek_other RENAME TO peek_team")
            admin.execute("DROP ROLE peek_reborn")


def test_who_reads_all_statistics_reads_those_of_its_own_cluster(front: FrontThread, database: str) -> None:
    found = seen(front.url(database))
    assert found == ["SELECT infer($1) AS of_the_team", "SELECT infer($1) AS of_the_victim"]


def test_a_role_that_is_another_tenants_now_does_not_see_what_it_did_before(
    front: FrontThread, database: str, meta_url: str
) -> None:
    url = front.url(database, "peek_victim")
    assert seen(url) == ["SELECT infer($1) AS of_the_victim"]
    with psycopg.connect(meta_url) as connection:
        connection.execute("UPDATE stratakv.tenant_roles SET tenant_id = 1 WHERE role_name = 'peek_victim'")
    assert seen(url) == []


async def test_without_the_cluster_or_the_oid_nobody_is_taken_for_anybody(meta_url: str) -> None:
    stats = StatementStats(DatabaseSettings(url=Secret(meta_url)), lambda: None)
    unknown = Login("peek_thief", 999, "1")
    stats.add(StatementKey("peek_thief", "d", None, "q"), StatementCounts(calls=1))
    stats.add(StatementKey("peek_thief", "d", unknown, "q"), StatementCounts(calls=1))
    for login in (None, unknown, replace(ELSEWHERE, cluster="")):
        for is_all in (False, True):
            with pytest.raises(PermissionDenied, match="do not say which role"):
                await stats.read("peek_thief", login, is_all=is_all)
    assert await stats.read("peek_thief", ELSEWHERE, is_all=False) == []
    await stats.close()


async def test_logins_of_one_tenant_that_set_the_same_role_share_a_row(meta_url: str) -> None:
    stats = StatementStats(DatabaseSettings(url=Secret(meta_url)), lambda: None)
    for name in ("ada", "bob"):
        login = Login(name, 1000 + len(name), "9", caller_oid=77)
        stats.add(StatementKey("team", "d", login, "q"), StatementCounts(calls=1, infer_calls=3))
    (row,) = await stats.read("team", Login("eve", 5, "9", caller_oid=77), is_all=False)
    assert (row["calls"], row["infer_calls"]) == (2, 6)
    await stats.close()
