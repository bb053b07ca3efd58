"""Nobody calls infer() as somebody else, and nobody but PostgreSQL reaches the private listener."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from psycopg import errors

from dbnode.sql.messages import int32
from dbnode.sql.service import Login
from stratakv.postgres import EmbeddedPostgres
from stratakv.sqlfunctions import ListenerAddress, install
from stratakv.sqlfunctions.address import KEY_FILE
from tests.integration.sql.harness import FrontThread, ReversingModel, front_thread
from tests.support import free_port

Connection = psycopg.Connection[tuple[object, ...]]
DBLINK = "stratakv_dblink"


def test_ordinary_role_is_told_as_itself(alice: Connection, model: ReversingModel) -> None:
    alice.execute("SELECT infer('a')")
    alice.execute("SET ROLE team")
    alice.execute("SELECT infer('b')")
    alice.execute("RESET ROLE")
    alice.execute("SELECT infer('c')")
    assert [call.role for call in model.calls] == ["alice", "team", "alice"]


def test_role_is_told_from_within_definer_functions_and_views(
    alice: Connection, roles: Connection, model: ReversingModel
) -> None:
    roles.execute("CREATE FUNCTION f() RETURNS text LANGUAGE sql SECURITY DEFINER AS 'SELECT public.infer(''x'')'")
    roles.execute("CREATE VIEW v AS SELECT public.infer('y') AS answer; GRANT SELECT ON v TO alice")
    alice.execute("SELECT f(), (SELECT answer FROM v)")
    assert {call.role for call in model.calls} == {"alice"}


def test_no_role_can_claim_one_it_is_no_member_of(alice: Connection) -> None:
    for statement in ("SET ROLE bob", "SET SESSION AUTHORIZATION bob", "SELECT set_config('role', 'bob', false)"):
        with pytest.raises(errors.InsufficientPrivilege):
            alice.execute(statement)


def test_tables_with_key_and_address_are_closed(alice: Connection) -> None:
    for table in ("stratakv.sql_listeners", "stratakv.sql_install"):
        with pytest.raises(errors.InsufficientPrivilege):
            alice.execute(f"SELECT * FROM {table}")


def test_default_privileges_do_not_open_the_tables(
    cluster: EmbeddedPostgres, front: FrontThread, alice: Connection
) -> None:
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE open_by_default")
    url = cluster.database_url("open_by_default")
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC")
        install(url, front.front.address)
        readable = "SELECT has_table_privilege('alice', 'stratakv.sql_listeners', 'SELECT')"
        assert admin.execute(readable).fetchone() == (False,)
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as admin:
        admin.execute("DROP DATABASE open_by_default WITH (FORCE)")


def test_inner_functions_and_dblink_are_closed(alice: Connection) -> None:
    for call in (
        "stratakv.sql_connect('x', NULL)",
        "stratakv.sql_ask('x', 'poll')",
        f"{DBLINK}.dblink_connect('x', 'dbname=postgres')",
        f"{DBLINK}.dblink_get_connections()",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            alice.execute(f"SELECT {call}")


@pytest.mark.parametrize("grantee", ["alice", "team", "bob", "PUBLIC"])
def test_every_call_is_refused_while_an_ordinary_role_may_use_dblink(
    alice: Connection, roles: Connection, grantee: str
) -> None:
    alice.execute("SELECT infer('a')")
    roles.execute(f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {DBLINK} TO {grantee}")
    for session in (alice, roles):
        with pytest.raises(errors.InsufficientPrivilege, match="dblink"):
            session.execute("SELECT stratakv.infer('a')")
    roles.execute(f"REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA {DBLINK} FROM {grantee}")
    assert alice.execute("SELECT infer('ab')").fetchone() == ("ba",)


def test_connection_opened_beforehand_catches_no_prompt(
    alice: Connection, roles: Connection, direct_url: str, database: str, model: ReversingModel
) -> None:
    """The names a role can think of are not ours: what it opened while it could is never used."""
    roles.execute(f"GRANT USAGE ON SCHEMA {DBLINK} TO alice")
    roles.execute(f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {DBLINK} TO alice")
    socket_dir = psycopg.conninfo.conninfo_to_dict(direct_url)["host"]
    own = f"host={socket_dir} dbname={database} user=alice password=x"
    for name in ("stratakv", "stratakv_", "stratakv.infer"):
        with pytest.raises(psycopg.Error):
            # PostgreSQL itself wants an ordinary role to be asked for a password.
            alice.execute(f"SELECT {DBLINK}.dblink_connect(%s, %s)", (name, own))
    roles.execute(f"REVOKE ALL ON ALL FUNCTIONS IN SCHEMA {DBLINK} FROM alice")
    roles.execute(f"REVOKE USAGE ON SCHEMA {DBLINK} FROM alice")
    assert alice.execute("SELECT infer('ab')").fetchone() == ("ba",)
    assert model.calls[-1].role == "alice"


def test_connection_names_differ_from_installation_to_installation(
    roles: Connection, cluster: EmbeddedPostgres, front: FrontThread, direct_url: str
) -> None:
    before = roles.execute("SELECT connection_name FROM stratakv.sql_install").fetchone()
    install(direct_url, front.front.address)
    assert roles.execute("SELECT connection_name FROM stratakv.sql_install").fetchone() == before
    assert before is not None
    assert len(str(before[0])) > 40


def test_search_path_cannot_shadow_what_the_function_uses(
    alice: Connection, roles: Connection, model: ReversingModel
) -> None:
    roles.execute("CREATE SCHEMA trap; GRANT ALL ON SCHEMA trap TO alice")
    for definition in (
        "FUNCTION trap.encode(bytea, text) RETURNS text LANGUAGE sql AS $$ SELECT 'stolen' $$",
        "FUNCTION trap.current_setting(text) RETURNS text LANGUAGE sql AS $$ SELECT 'bob' $$",
        "FUNCTION trap.format(text, VARIADIC \"any\") RETURNS text LANGUAGE internal AS 'text_format'",
        "TABLE pg_temp.sql_install AS SELECT 'mine' AS connection_name",
        "TABLE pg_temp.pg_proc AS SELECT 1 AS proname",
        "OPERATOR trap.|| (LEFTARG = text, RIGHTARG = text, FUNCTION = textlike)",
    ):
        with contextlib.suppress(errors.InsufficientPrivilege, errors.InvalidFunctionDefinition):
            alice.execute(f"CREATE {definition}")
    alice.execute("SET search_path = trap, pg_temp, pg_catalog, public")
    assert alice.execute("SELECT stratakv.infer('ab')").fetchone() == ("ba",)
    assert model.calls[-1].role == "alice"


def test_forged_nonce_binds_nothing(alice: Connection, front: FrontThread, model: ReversingModel) -> None:
    for nonce in ("", "0" * 32):
        with pytest.raises(errors.InvalidAuthorizationSpecification):
            alice.execute("SELECT stratakv.bind(%s, %s)", (nonce, front.front.address.name))
    assert alice.execute("SELECT stratakv.bind('x', '/elsewhere:1')").fetchone() == (False,)
    alice.execute("SELECT infer('a')")
    assert model.calls[-1].role == "alice"


def test_bound_sessions_nonce_is_used_up(alice: Connection, front: FrontThread) -> None:
    alice.execute("SELECT infer('a')")
    assert front.front.relay.registry._issued == {}


def _first_bytes(path: str) -> bytes:
    """The answer to a libpq startup packet."""
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(path)
        with contextlib.suppress(BrokenPipeError):  # refused already; what it said can still be read
            raw.sendall(int32(16) + int32(196608) + b"user\0x\0\0")
        return raw.recv(4096)


def test_wrong_uid_on_the_socket_is_refused(cluster: EmbeddedPostgres, tmp_path: Path) -> None:
    thread = front_thread(cluster, tmp_path, ReversingModel(), postgres_uid=os.geteuid() + 4321)
    with thread as running:
        answer = _first_bytes(str(running.front.address.socket_path))
    assert answer.startswith(b"E")
    assert b"42501" in answer


def test_wrong_key_is_refused(front: FrontThread, direct_url: str, model: ReversingModel) -> None:
    wrong = replace(front.front.address, key="guess")
    with psycopg.connect(direct_url, autocommit=True) as connection:
        connection.execute(
            "UPDATE stratakv.sql_listeners SET conninfo = %s", (wrong.conninfo(connection.info.server_version),)
        )
        with pytest.raises(errors.SqlclientUnableToEstablishSqlconnection, match="could not establish connection"):
            connection.execute("SELECT infer('a')")
    assert model.calls == []


def test_key_file_is_for_the_owner_only(listener_dir: Path, front: FrontThread) -> None:
    assert (listener_dir / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert front.front.address.key not in repr(front.front.address)


def test_listener_over_tcp_works_for_an_owner_who_is_no_superuser(
    cluster: EmbeddedPostgres, direct_url: str, database: str, tmp_path: Path
) -> None:
    """As on a managed PostgreSQL: dblink then insists on being asked for a password."""
    port = free_port()
    with (
        front_thread(
            cluster, None, ReversingModel(), listener_host="127.0.0.1", listener_port=port, listener_key="k e'y\\1"
        ) as running,
        psycopg.connect(direct_url, autocommit=True) as admin,
    ):
        install(direct_url, ListenerAddress("127.0.0.1", port, "k e'y\\1"))
        admin.execute("CREATE ROLE manager")
        admin.execute(f"GRANT USAGE ON SCHEMA {DBLINK} TO manager")
        admin.execute(f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {DBLINK} TO manager")
        admin.execute("ALTER SCHEMA stratakv OWNER TO manager")
        for item in (
            "FUNCTION stratakv.infer",
            "FUNCTION stratakv.bind",
            "FUNCTION stratakv.sql_ask",
            "FUNCTION stratakv.sql_connect",
            "FUNCTION stratakv.sql_check_dblink",
            "FUNCTION stratakv.sql_caller",
            "FUNCTION stratakv.sql_caller_word",
            "TABLE stratakv.sql_install",
            "TABLE stratakv.sql_listeners",
        ):
            admin.execute(f"ALTER {item} OWNER TO manager")
        try:
            with psycopg.connect(running.url(database), autocommit=True) as client:
                for _ in range(2):
                    assert client.execute("SELECT infer('ab')").fetchone() == ("ba",)
                sessions = {call.session for call in running.model.calls}
                assert len(sessions) == 1
                assert sessions.pop().startswith("sql-")
        finally:
            admin.execute("REASSIGN OWNED BY manager TO postgres; DROP OWNED BY manager; DROP ROLE manager")


def test_the_role_that_has_logged_in_is_told_with_its_oid_and_cluster_whatever_role_is_set(
    alice: Connection, roles: Connection, model: ReversingModel
) -> None:
    alice.execute("SELECT infer('a')")
    alice.execute("SET ROLE team")
    alice.execute("SELECT infer('b')")
    (oid,), (team_oid,) = roles.execute(
        "SELECT rolname::regrole::oid::bigint FROM pg_roles WHERE rolname IN ('alice', 'team') ORDER BY rolname"
    ).fetchall()
    cluster = roles.execute("SELECT system_identifier::text FROM pg_control_system()").fetchone()
    first, second = model.calls
    assert (first.role, second.role) == ("alice", "team")
    assert cluster is not None
    assert first.login == Login("alice", oid, str(cluster[0]), caller_oid=oid)
    assert second.login == replace(first.login, caller_oid=team_oid)
