"""A tenant's role sees its own usage and limits, and no way leads it to another tenant's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from tests.integration.usage.conftest import event, write_now

Query = Callable[..., list[tuple[Any, ...]]]
Connection = psycopg.Connection[tuple[Any, ...]]
ROLES = ("acme_app", "bolt_app", "nobody_app")
GUARDED = ("usage_history", "usage_daily", "tenant_limits", "quota_state", "cache_usage")
FOR_TENANTS = {*GUARDED, "my_usage", "my_requests", "my_limits", "limits_in_use"}
MAP = """
    INSERT INTO stratakv.tenant_roles (cluster, role_name, role_oid, tenant_id)
    SELECT c.system_identifier::text, r.rolname, r.oid, t.id
    FROM pg_control_system() c, pg_roles r, stratakv.tenants t WHERE r.rolname = %s AND t.name = %s
    ON CONFLICT (cluster, role_name) DO UPDATE SET role_oid = excluded.role_oid, tenant_id = excluded.tenant_id
"""


@pytest.fixture
def world(url: str, query: Query) -> Iterator[str]:
    """acme_app logs in for acme, bolt_app for bolt; each has used something and has limits."""
    drop_roles(url)
    for role in ROLES:
        query(f"CREATE ROLE {role} LOGIN")
    query(MAP, "acme_app", "acme")
    query(MAP, "bolt_app", "bolt")
    write_now(url, event("a1", prompt=100), event("a2", model="n"), event("b1", "bolt"))
    query(
        "INSERT INTO stratakv.tenant_limits (tenant_id, tokens_per_month, requests_per_minute, cache_memory_bytes)"
        " SELECT id, 1000 * id, 60, 4096 FROM stratakv.tenants WHERE name IN ('acme', 'bolt')"
    )
    query("INSERT INTO stratakv.cache_usage SELECT id, 10 * id, 0 FROM stratakv.tenants WHERE name IN ('acme', 'bolt')")
    query(
        "INSERT INTO stratakv.quota_state (tenant_id, kind, spent_micros)"
        " SELECT id, 'tokens_month', id * 1000000 FROM stratakv.tenants WHERE name IN ('acme', 'bolt')"
    )
    yield url
    drop_roles(url)


def drop_roles(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as admin:
        for (role,) in admin.execute("SELECT rolname FROM pg_roles WHERE rolname LIKE '%\\_app'").fetchall():
            admin.execute(f"DROP OWNED BY {role} CASCADE".encode())
            admin.execute(f"DROP ROLE {role}".encode())


@contextmanager
def session(url: str, role: str) -> Iterator[Connection]:
    with psycopg.connect(url.replace("postgres@", f"{role}@", 1), autocommit=True) as connection:
        yield connection


def models(connection: Connection) -> list[str]:
    return [row[0] for row in connection.execute("SELECT model FROM stratakv.my_usage ORDER BY model").fetchall()]


def visible(connection: Connection) -> set[int]:
    """Tenants whose rows can be seen in any guarded table."""
    found: set[int] = set()
    for table in GUARDED:
        found |= {row[0] for row in connection.execute(f"SELECT tenant_id FROM stratakv.{table}".encode()).fetchall()}
    return found


def test_a_role_sees_the_usage_requests_and_limits_of_its_tenant(world: str, query: Query) -> None:
    [(acme,)] = query("SELECT id FROM stratakv.tenants WHERE name = 'acme'")
    with session(world, "acme_app") as acme_app:
        assert models(acme_app) == ["m", "n"]
        requests = acme_app.execute("SELECT request_id FROM stratakv.my_requests ORDER BY 1").fetchall()
        assert requests == [("a1",), ("a2",)]
        limits = acme_app.execute('SELECT "limit", maximum, used FROM stratakv.my_limits ORDER BY 1').fetchall()
        assert limits == [
            ("cache_memory_bytes", 4096, 10 * acme),
            ("requests_per_minute", 60, 0),
            ("tokens_per_month", 1000 * acme, acme),
        ]
        assert visible(acme_app) == {acme}
    with session(world, "nobody_app") as nobody:
        assert models(nobody) == []
        assert visible(nobody) == set()


def test_whatever_is_not_for_tenants_is_not_to_be_read_nor_a_month_past_its_table(world: str, query: Query) -> None:
    relations = query(
        "SELECT relname FROM pg_class WHERE relnamespace = 'stratakv'::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'S')"
    )
    closed = {name for (name,) in relations} - FOR_TENANTS
    assert {"usage_events", "api_keys", "audit_log", "statements", "sql_statements", "conversation_items"} <= closed
    assert any(name.startswith("usage_history_") for name in closed)
    with session(world, "acme_app") as acme_app:
        for name in closed:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                acme_app.execute(f"SELECT * FROM stratakv.{name}".encode())


@pytest.mark.parametrize("table", GUARDED)
def test_nothing_can_be_changed(world: str, table: str) -> None:
    with session(world, "acme_app") as acme_app:
        for statement in ("DELETE FROM {}", "UPDATE {} SET tenant_id = tenant_id", "TRUNCATE {}"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                acme_app.execute(statement.format(f"stratakv.{table}").encode())


def test_a_function_in_the_condition_is_shown_no_other_row(world: str) -> None:
    with session(world, "acme_app") as acme_app:
        acme_app.execute(
            "CREATE FUNCTION pg_temp.leak(text) RETURNS boolean LANGUAGE plpgsql COST 0.0001 AS"
            " $$ BEGIN RAISE NOTICE 'seen %', $1; RETURN true; END $$"
        )
        seen: list[str] = []
        acme_app.add_notice_handler(lambda notice: seen.append(str(notice.message_primary)))
        acme_app.execute("SELECT FROM stratakv.my_requests WHERE pg_temp.leak(request_id)")
        acme_app.execute("SELECT FROM stratakv.usage_history WHERE pg_temp.leak(request_id)")
    assert set(seen) == {"seen a1", "seen a2"}


def test_functions_and_views_of_another_tenants_role_show_the_callers_rows(world: str, query: Query) -> None:
    query("CREATE SCHEMA bolt AUTHORIZATION bolt_app")
    query("GRANT USAGE ON SCHEMA bolt TO PUBLIC")
    with session(world, "bolt_app") as bolt_app:
        bolt_app.execute(
            "CREATE FUNCTION bolt.mine() RETURNS SETOF text LANGUAGE sql SECURITY DEFINER"
            " AS $$ SELECT request_id FROM stratakv.my_requests UNION ALL SELECT request_id FROM stratakv.usage_history $$"
        )
        bolt_app.execute("CREATE VIEW bolt.view AS SELECT request_id FROM stratakv.usage_history")
        bolt_app.execute("GRANT SELECT ON bolt.view TO PUBLIC")
        assert set(bolt_app.execute("SELECT bolt.mine()").fetchall()) == {("b1",)}
    with session(world, "acme_app") as acme_app:
        assert set(acme_app.execute("SELECT bolt.mine()").fetchall()) == {("a1",), ("a2",)}
        assert set(acme_app.execute("SELECT * FROM bolt.view").fetchall()) == {("a1",), ("a2",)}


def test_another_role_that_one_may_set_changes_nothing(world: str, query: Query) -> None:
    query("GRANT bolt_app TO acme_app")
    with session(world, "acme_app") as acme_app:
        acme_app.execute("SET ROLE bolt_app")
        assert models(acme_app) == ["m", "n"]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            acme_app.execute("SET SESSION AUTHORIZATION bolt_app")


def test_names_in_the_callers_search_path_deceive_nobody(world: str) -> None:
    with session(world, "acme_app") as acme_app:
        acme_app.execute("CREATE TEMP TABLE tenant_roles AS SELECT 'x'::text AS cluster, 'acme_app'::text AS role_name")
        acme_app.execute(
            "CREATE FUNCTION pg_temp.pg_control_system() RETURNS TABLE (system_identifier bigint)"
            " LANGUAGE sql AS 'SELECT 1::bigint'"
        )
        acme_app.execute("SET search_path = pg_temp, stratakv, pg_catalog")
        assert models(acme_app) == ["m", "n"]


def test_a_role_that_is_made_anew_under_the_name_sees_nothing(world: str, query: Query) -> None:
    query("DROP ROLE acme_app")
    query("CREATE ROLE acme_app LOGIN")
    with session(world, "acme_app") as impostor:
        assert models(impostor) == []
        assert visible(impostor) == set()
    query(MAP, "acme_app", "acme")
    with session(world, "acme_app") as acme_app:
        assert models(acme_app) == ["m", "n"]


def test_a_role_that_takes_the_name_of_another_sees_nothing(world: str, query: Query) -> None:
    query("ALTER ROLE acme_app RENAME TO old_app")
    query("ALTER ROLE bolt_app RENAME TO acme_app")
    for name in ("acme_app", "old_app"):
        with session(world, name) as renamed:
            assert models(renamed) == []
            assert visible(renamed) == set()


def test_a_mapping_of_another_cluster_says_nothing(world: str, query: Query) -> None:
    query("UPDATE stratakv.tenant_roles SET cluster = '42'")
    with session(world, "acme_app") as acme_app:
        assert models(acme_app) == []


def test_services_that_own_the_schema_without_being_superuser_see_and_write_all(world: str, query: Query) -> None:
    """The owner is subject to the policies too, since they are forced."""
    query("CREATE ROLE owner_app LOGIN")
    query(
        "DO $$ DECLARE t record; BEGIN FOR t IN SELECT c.oid::regclass AS name FROM pg_class c"
        " WHERE c.relnamespace = 'stratakv'::regnamespace AND c.relkind IN ('r', 'p') LOOP"
        " EXECUTE format('ALTER TABLE %s OWNER TO owner_app', t.name); END LOOP; END $$"
    )
    write_now(world.replace("postgres@", "owner_app@", 1), event("a3"), event("b2", "bolt"))
    with session(world, "owner_app") as owner:
        assert owner.execute("SELECT count(*) FROM stratakv.usage_history").fetchone() == (5,)
        assert owner.execute("SELECT sum(requests) FROM stratakv.usage_daily").fetchone() == (5,)
        assert owner.execute("SELECT * FROM stratakv.my_usage").fetchall() == []
    query("REASSIGN OWNED BY owner_app TO postgres")


def test_a_service_with_rights_on_what_it_writes_only_settles_requests(world: str, query: Query) -> None:
    query("CREATE ROLE writer_app LOGIN")
    query("GRANT SELECT, INSERT ON stratakv.usage_events TO writer_app")
    query("GRANT SELECT ON stratakv.tenants TO writer_app")
    write_now(world.replace("postgres@", "writer_app@", 1), event("a3"))
    assert query("SELECT count(*) FROM stratakv.usage_history WHERE request_id = 'a3'") == [(1,)]
    assert query("SELECT sum(requests) FROM stratakv.usage_daily") == [(4,)]
    with session(world, "writer_app") as writer:
        assert visible(writer) == set()
