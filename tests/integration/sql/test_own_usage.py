"""my_usage, my_requests and my_limits where the metadata lie elsewhere: told by the DB node, to each role its tenant's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest

from dbnode.metadata import Metadata
from dbnode.own_usage import own_usage_topics
from stratakv import migrate
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import DatabaseSettings, Secret
from stratakv.sqlfunctions import install, uninstall
from tests.integration.sql.harness import FrontThread, ReversingModel, address_in, front_thread

ROLES = ("usage_acme", "usage_bolt", "usage_nobody")
SEED = """
    INSERT INTO stratakv.tenants (name) VALUES ('acme'), ('bolt');
    INSERT INTO stratakv.tenant_roles (cluster, role_name, role_oid, tenant_id)
        SELECT c.system_identifier::text, r.rolname, r.oid, t.id FROM pg_control_system() c, pg_roles r, stratakv.tenants t
        WHERE r.rolname = 'usage_' || t.name;
    INSERT INTO stratakv.tenant_limits (tenant_id, tokens_per_month) SELECT id, 500 FROM stratakv.tenants;
    INSERT INTO stratakv.usage_events (request_id, tenant_id, model, source, prompt_tokens, queue_ms, outcome)
        SELECT t.name || i, t.id, 'm', 'sql', 10 * i, 1.5, 'completed' FROM stratakv.tenants t, generate_series(1, 3) i
"""


@pytest.fixture(scope="module")
def metadata_url(cluster: EmbeddedPostgres) -> Iterator[str]:
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE usage_meta")
        for role in ROLES:
            admin.execute(f"CREATE ROLE {role} LOGIN".encode())
        url = cluster.database_url("usage_meta")
        migrate.upgrade(url)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(SEED.encode())
        yield url
        admin.execute("DROP DATABASE usage_meta WITH (FORCE)")
        for role in ROLES:
            admin.execute(f"DROP ROLE {role}".encode())


@pytest.fixture(scope="module")
def front(
    cluster: EmbeddedPostgres, metadata_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FrontThread]:
    directory = tmp_path_factory.mktemp("skv")
    directory.chmod(0o711)
    for parent in directory.parents:
        with suppress(PermissionError):
            parent.chmod(parent.stat().st_mode | 0o111)
    metadata = Metadata(DatabaseSettings(url=Secret(metadata_url)))
    with front_thread(cluster, directory, ReversingModel(), topics=own_usage_topics(metadata)) as thread:
        yield thread
        thread.run(metadata.close())


@pytest.fixture
def database(cluster: EmbeddedPostgres, front: FrontThread) -> Iterator[str]:
    """With the functions, and without the metadata."""
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE usage_data")
        install(cluster.database_url("usage_data"), address_in(front.settings.listener_dir))  # type: ignore[arg-type]
        yield "usage_data"
        admin.execute("DROP DATABASE usage_data WITH (FORCE)")


def ask(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(query.encode()).fetchall()


@pytest.mark.parametrize("is_direct", [False, True], ids=["relay", "direct"])
def test_each_role_sees_its_tenants_usage_requests_and_limits(
    cluster: EmbeddedPostgres, front: FrontThread, database: str, is_direct: bool
) -> None:
    for tenant in ("acme", "bolt"):
        role = f"usage_{tenant}"
        direct = cluster.database_url(database).replace("postgres@", f"{role}@", 1)
        url = direct if is_direct else front.url(database, role)
        assert ask(url, "SELECT model, requests, prompt_tokens FROM stratakv.my_usage") == [("m", 3, 60)]
        found = ask(url, "SELECT request_id, queue_ms FROM stratakv.my_requests ORDER BY 1")
        assert found == [(f"{tenant}{i}", 1.5) for i in range(1, 4)]
        assert ask(url, "SELECT * FROM stratakv.my_limits") == [("tokens_per_month", 500, 0)]


def test_who_logs_in_for_no_tenant_sees_nothing(front: FrontThread, database: str) -> None:
    for role in ("usage_nobody", "postgres"):
        assert ask(front.url(database, role), "SELECT * FROM stratakv.my_usage") == []
        assert ask(front.url(database, role), "SELECT * FROM stratakv.my_requests") == []


def test_another_role_that_one_may_set_changes_nothing(
    cluster: EmbeddedPostgres, front: FrontThread, database: str
) -> None:
    ask_admin = cluster.database_url("postgres")
    with psycopg.connect(ask_admin, autocommit=True) as admin:
        admin.execute("GRANT usage_bolt TO usage_nobody")
        with psycopg.connect(front.url(database, "usage_nobody"), autocommit=True) as connection:
            connection.execute("SET ROLE usage_bolt")
            assert connection.execute("SELECT * FROM stratakv.my_usage").fetchall() == []
        admin.execute("REVOKE usage_bolt FROM usage_nobody")


def test_the_question_cannot_be_asked_in_anothers_name(front: FrontThread, database: str) -> None:
    with psycopg.connect(front.url(database, "usage_nobody"), autocommit=True) as connection:
        for call in ("stratakv.sql_ask_node('usage', '{}')", "stratakv.sql_call('ask 1 6d 6d usage =e30=')"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(f"SELECT {call}".encode())


def test_where_the_metadata_are_the_functions_leave_the_views_alone(
    cluster: EmbeddedPostgres, front: FrontThread, metadata_url: str
) -> None:
    is_view_of_ours = "SELECT definition LIKE '%usage_daily%' FROM pg_views WHERE viewname = 'my_usage'"
    install(metadata_url, address_in(front.settings.listener_dir))  # type: ignore[arg-type]
    assert ask(metadata_url, is_view_of_ours) == [(True,)]
    role_url = front.url("usage_meta", "usage_acme")
    assert ask(role_url, "SELECT model, requests, prompt_tokens FROM stratakv.my_usage") == [("m", 3, 60)]
    uninstall(metadata_url)
    assert ask(metadata_url, is_view_of_ours) == [(True,)]
    assert ask(role_url, "SELECT model, requests FROM stratakv.my_usage") == [("m", 3)]


def test_without_the_functions_nothing_of_the_views_is_left(
    cluster: EmbeddedPostgres, front: FrontThread, database: str
) -> None:
    url = cluster.database_url(database)
    uninstall(url)
    assert ask(url, "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'stratakv%'") == []
