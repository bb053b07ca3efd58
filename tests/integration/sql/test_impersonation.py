"""What a role might try so that its code runs as another's, that it is taken for another, or that it sees another's rows."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import errors

from stratakv.postgres import EmbeddedPostgres
from stratakv.sqlfunctions import install
from tests.integration.sql.harness import FrontThread, ReversingModel

Connection = psycopg.Connection[tuple[object, ...]]
DBLINK = "stratakv_dblink"
TAKE_OVER = "BEGIN EXECUTE 'ALTER ROLE alice SUPERUSER'; EXCEPTION WHEN insufficient_privilege THEN NULL; END"


def _is_superuser(admin: Connection, role: str) -> bool:
    return admin.execute("SELECT rolsuper FROM pg_roles WHERE rolname = %s", (role,)).fetchone() == (True,)


# The gateway's own statements run as the client's role


def test_function_planted_in_a_database_without_ours_is_not_run_for_others(
    cluster: EmbeddedPostgres, front: FrontThread, roles: Connection
) -> None:
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE bare")
        admin.execute("GRANT CREATE ON DATABASE bare TO alice")
    try:
        with psycopg.connect(front.url("bare", "alice"), autocommit=True) as alice:
            alice.execute("CREATE SCHEMA stratakv; GRANT USAGE ON SCHEMA stratakv TO PUBLIC")
            for volatility, arguments, security in (
                ("VOLATILE", "text, text", "INVOKER"),
                ("IMMUTABLE", "text, varchar DEFAULT NULL", "INVOKER"),
                ("VOLATILE", "text, VARIADIC text[]", "DEFINER"),
            ):
                alice.execute(
                    f"CREATE FUNCTION stratakv.bind({arguments}) RETURNS boolean LANGUAGE plpgsql {volatility}"
                    f" SECURITY {security} AS $$ BEGIN {TAKE_OVER}; RETURN true; END $$".encode()
                )
                with psycopg.connect(front.url("bare"), autocommit=True) as victim:
                    assert victim.execute("SELECT 'infer'").fetchone() == ("infer",)
                assert not _is_superuser(roles, "alice")
                alice.execute(f"DROP FUNCTION stratakv.bind({arguments.replace(' DEFAULT NULL', '')})".encode())
    finally:
        with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as admin:
            admin.execute("DROP DATABASE bare WITH (FORCE)")


def test_operators_planted_on_the_search_path_are_not_run_for_others(
    front: FrontThread, database: str, roles: Connection, alice: Connection
) -> None:
    roles.execute("GRANT CREATE ON SCHEMA public TO alice")
    roles.execute("CREATE TABLE public.t AS SELECT 'b' || i AS body FROM generate_series(1, 3) i")
    for left, operator, right, result in (
        ("int", "*", "numeric", "numeric"),
        ("name", "=", "text", "boolean"),
        ('"char"', "=", "text", "boolean"),
        ("oid", "=", "regclass", "boolean"),
        ("text", ">=", "text", "boolean"),
    ):
        alice.execute(
            f"CREATE OR REPLACE FUNCTION public.planted({left}, {right}) RETURNS {result} LANGUAGE plpgsql AS"
            f" $$ BEGIN {TAKE_OVER}; RETURN NULL; END $$".encode()
        )
        alice.execute(
            f"CREATE OPERATOR public.{operator}"
            f" (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = public.planted)".encode()
        )
    with psycopg.connect(front.url(database), autocommit=True) as victim:
        for path in ("public", "public, pg_catalog"):
            victim.execute(f"SET search_path = {path}".encode())
            rows = victim.execute("SELECT stratakv.infer(body) FROM public.t").fetchall()
            assert sorted(rows) == [("1b",), ("2b",), ("3b",)]
    assert not _is_superuser(roles, "alice")


# Who calls


def test_name_that_another_role_has_come_to_is_not_reported(
    alice: Connection, roles: Connection, model: ReversingModel
) -> None:
    alice.execute("SET ROLE team")
    roles.execute("ALTER ROLE team RENAME TO renamed; ALTER ROLE bob RENAME TO team")
    try:
        with pytest.raises(errors.InsufficientPrivilege, match="no longer"):
            alice.execute("SELECT infer('a')")
        assert model.calls == []
    finally:
        roles.execute("ALTER ROLE team RENAME TO bob; ALTER ROLE renamed RENAME TO team")
    assert alice.execute("SELECT infer('ab')").fetchone() == ("ba",)
    assert model.calls[-1].role == "team"


def test_session_authorization_is_reported_where_postgresql_grants_it(
    front: FrontThread, database: str, roles: Connection, model: ReversingModel
) -> None:
    with psycopg.connect(front.url(database), autocommit=True) as session:
        for statement in ("SET SESSION AUTHORIZATION alice", "SET ROLE team", "RESET SESSION AUTHORIZATION"):
            session.execute(statement.encode())
            session.execute("SELECT infer('a')")
    assert [call.role for call in model.calls] == ["alice", "team", "postgres"]


def test_chain_of_definer_functions_reports_the_session(
    alice: Connection, roles: Connection, model: ReversingModel
) -> None:
    roles.execute(
        "CREATE FUNCTION inner_one(x text) RETURNS text LANGUAGE plpgsql SECURITY DEFINER AS"
        " 'BEGIN RETURN stratakv.infer(x); END'; ALTER FUNCTION inner_one OWNER TO bob"
    )
    roles.execute(
        "CREATE FUNCTION outer_one(x text) RETURNS text LANGUAGE sql SECURITY DEFINER AS 'SELECT public.inner_one(x)'"
    )
    alice.execute("SELECT outer_one('x')")
    alice.execute("SET ROLE team")
    alice.execute("SELECT outer_one('y')")
    assert [call.role for call in model.calls] == ["alice", "team"]
    roles.execute(
        "CREATE FUNCTION switch() RETURNS text LANGUAGE plpgsql SECURITY DEFINER AS"
        " 'BEGIN SET ROLE bob; RETURN stratakv.infer(''z''); END'"
    )
    with pytest.raises(errors.InsufficientPrivilege):
        alice.execute("SELECT switch()")


def test_answers_of_one_role_are_not_anothers_within_a_statement(
    alice: Connection, roles: Connection, model: ReversingModel
) -> None:
    """Answers may differ by role: tenants have their own models and limits."""
    roles.execute(
        "CREATE FUNCTION as_team(x text) RETURNS text LANGUAGE sql STABLE SET role = team AS 'SELECT stratakv.infer(x)'"
    )
    query = "SELECT infer('same ' || i), as_team('same ' || i) FROM generate_series(1, 3) i"
    assert alice.execute(query).fetchall() == [(f"{i} emas",) * 2 for i in (1, 2, 3)]
    assert sorted((call.role, call.prompt) for call in model.calls) == [
        (role, f"same {i}") for role in ("alice", "team") for i in (1, 2, 3)
    ]


@pytest.mark.parametrize("kind", ["plpgsql STABLE", "plpgsql STABLE SECURITY DEFINER", "sql STABLE"])
def test_wrapper_that_claims_to_be_parallel_safe_reports_the_session(
    alice: Connection, roles: Connection, model: ReversingModel, kind: str
) -> None:
    language = kind.partition(" ")[0]
    body = "SELECT stratakv.infer(x)" if language == "sql" else "BEGIN RETURN stratakv.infer(x); END"
    roles.execute(
        f"CREATE FUNCTION wrapper(x text) RETURNS text LANGUAGE {kind} PARALLEL SAFE AS $$ {body} $$".encode()
    )
    roles.execute("CREATE TABLE big AS SELECT i FROM generate_series(1, 20000) i; GRANT SELECT ON big TO PUBLIC")
    roles.execute("ANALYZE big")
    alice.execute("SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0")
    is_old = alice.info.server_version < 160_000
    alice.execute(f"SET {'force_parallel_mode' if is_old else 'debug_parallel_query'} = on".encode())
    query = "SELECT wrapper('r' || i) FROM big WHERE i % 5000 = 0"
    for role in ("alice", "team"):
        alice.execute(f"SET ROLE {role}".encode())
        model.calls.clear()
        assert sorted(alice.execute(query.encode()).fetchall()) == [("00001r",), ("00002r",), ("00051r",), ("0005r",)]
        assert alice.execute("SELECT wrapper('alone')").fetchone() == ("enola",)
        assert {call.role for call in model.calls} == {role}


# dblink, opened after the installation


@pytest.mark.parametrize("function", ["dblink_get_connections()", "dblink_connect_u(text, text)", "dblink(text)"])
@pytest.mark.parametrize("owner_keeps_it", [True, False])
def test_single_function_of_dblink_in_other_hands_stops_every_call(
    alice: Connection, roles: Connection, function: str, owner_keeps_it: bool
) -> None:
    assert alice.execute("SELECT infer('ab')").fetchone() == ("ba",)
    if not owner_keeps_it:
        roles.execute(f"REVOKE ALL ON FUNCTION {DBLINK}.{function} FROM postgres".encode())
    for grantee in ("alice", "PUBLIC"):
        roles.execute(f"GRANT EXECUTE ON FUNCTION {DBLINK}.{function} TO {grantee}".encode())
        with pytest.raises(errors.InsufficientPrivilege, match="dblink"):
            alice.execute("SELECT infer('ab')")
        roles.execute(f"REVOKE EXECUTE ON FUNCTION {DBLINK}.{function} FROM {grantee}".encode())
    roles.execute(f"GRANT EXECUTE ON FUNCTION {DBLINK}.{function} TO postgres".encode())
    assert alice.execute("SELECT infer('ab')").fetchone() == ("ba",)


def test_default_privileges_do_not_open_the_inner_functions(
    cluster: EmbeddedPostgres, front: FrontThread, roles: Connection
) -> None:
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE open_functions")
    url = cluster.database_url("open_functions")
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(
            "CREATE SCHEMA stratakv; ALTER DEFAULT PRIVILEGES IN SCHEMA stratakv GRANT ALL ON FUNCTIONS TO alice"
        )
        install(url, front.front.address)
        for function in ("sql_check_dblink()", "sql_connect(text, text)", "sql_ask(text, text)"):
            query = "SELECT has_function_privilege('alice', %s, 'EXECUTE')"
            assert admin.execute(query, (f"stratakv.{function}",)).fetchone() == (False,)
        admin.execute("ALTER DEFAULT PRIVILEGES IN SCHEMA stratakv REVOKE ALL ON FUNCTIONS FROM alice")
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as admin:
        admin.execute("DROP DATABASE open_functions WITH (FORCE)")


# While a pass runs, infer() answers NULL: nobody may see more by it

REMEMBER = """
CREATE SCHEMA AUTHORIZATION alice;
CREATE FUNCTION alice.remember(x text) RETURNS text LANGUAGE plpgsql STABLE COST 0.01 AS
$$ BEGIN PERFORM pg_advisory_lock(length(x)); RETURN x; END $$
"""
"""What it was shown is told by the locks that are left, also after the pass has been rolled back."""
HIDES = {
    "policy": """
        CREATE POLICY p ON docs USING (stratakv.infer(body) IS DISTINCT FROM 'terces'); GRANT SELECT ON docs TO alice;
        ALTER TABLE docs ENABLE ROW LEVEL SECURITY; CREATE VIEW readable AS SELECT * FROM docs;
        ALTER VIEW readable OWNER TO alice""",
    "policy by an inlined function": """
        CREATE FUNCTION ask(x text) RETURNS text LANGUAGE sql STABLE AS 'SELECT public.infer(x)';
        CREATE FUNCTION may_see(x text) RETURNS bool LANGUAGE sql STABLE AS 'SELECT public.ask(x) IS DISTINCT FROM ''terces''';
        CREATE POLICY p ON docs USING (may_see(body)); GRANT SELECT ON docs TO alice;
        ALTER TABLE docs ENABLE ROW LEVEL SECURITY; CREATE VIEW readable AS SELECT * FROM docs;
        ALTER VIEW readable OWNER TO alice""",
    "policy by a function": """
        CREATE FUNCTION may_see(x text) RETURNS bool LANGUAGE plpgsql STABLE AS
            'BEGIN RETURN infer(x) IS DISTINCT FROM ''terces''; END';
        CREATE POLICY p ON docs USING (may_see(body)); GRANT SELECT ON docs TO alice;
        ALTER TABLE docs ENABLE ROW LEVEL SECURITY; CREATE VIEW readable AS SELECT * FROM docs;
        ALTER VIEW readable OWNER TO alice""",
    "security barrier": """
        CREATE VIEW readable WITH (security_barrier) AS
            SELECT * FROM docs WHERE stratakv.infer(body) IS DISTINCT FROM 'terces'""",
    "definer function in plpgsql": """
        CREATE FUNCTION docs() RETURNS SETOF docs LANGUAGE plpgsql STABLE SECURITY DEFINER AS
            'BEGIN RETURN QUERY SELECT * FROM docs WHERE stratakv.infer(body) IS DISTINCT FROM ''terces''; END';
        CREATE VIEW readable AS SELECT * FROM docs(); ALTER VIEW readable OWNER TO alice""",
    "definer function in sql": """
        CREATE FUNCTION docs() RETURNS SETOF docs LANGUAGE sql STABLE SECURITY DEFINER AS
            'SELECT * FROM docs WHERE public.infer(body) IS DISTINCT FROM ''terces''';
        CREATE VIEW readable AS SELECT * FROM docs(); ALTER VIEW readable OWNER TO alice""",
}


@pytest.fixture
def docs(roles: Connection) -> Iterator[None]:
    roles.execute("CREATE TABLE docs AS SELECT unnest(ARRAY['public', 'secret', 'public too']) AS body")
    roles.execute(REMEMBER.encode())
    return


@pytest.mark.parametrize("how", HIDES)
def test_rows_that_infer_hides_stay_hidden_while_looking_ahead(
    roles: Connection, alice: Connection, docs: None, model: ReversingModel, how: str
) -> None:
    roles.execute(HIDES[how].encode())
    roles.execute("GRANT SELECT ON readable TO alice")
    rows = alice.execute("SELECT alice.remember(body), infer('of ' || body) FROM readable").fetchall()
    assert sorted(rows) == [("public", "cilbup fo"), ("public too", "oot cilbup fo")]
    shown = alice.execute(
        "SELECT DISTINCT objid::int FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
    )
    assert sorted(shown.fetchall()) == [(len("public"),), (len("public too"),)]
    assert "of secret" not in {call.prompt for call in model.calls}
    assert {call.role for call in model.calls} == {"alice"}


def test_what_a_policy_asks_is_not_told_to_the_reader(roles: Connection, alice: Connection) -> None:
    roles.execute("CREATE TABLE docs AS SELECT 'a secret of another' AS body; GRANT SELECT ON docs TO alice")
    roles.execute("CREATE POLICY p ON docs USING (infer(body, options => '{\"fail\": \"x\"}') = 'yes')")
    roles.execute("ALTER TABLE docs ENABLE ROW LEVEL SECURITY")
    notices: list[str] = []
    alice.add_notice_handler(lambda notice: notices.append(str(notice.message_primary)))
    for query in ("SELECT infer(body) FROM docs", "EXPLAIN (ANALYZE, VERBOSE) SELECT infer(body) FROM docs"):
        with pytest.raises(errors.InvalidParameterValue) as caught:
            alice.execute(query.encode())
        diag = caught.value.diag
        told = (diag.message_primary, diag.message_detail, diag.message_hint, diag.context, diag.internal_query)
        assert "secret" not in str((told, notices))


def test_policy_that_asks_about_its_own_table_ends_in_an_error(roles: Connection, alice: Connection) -> None:
    roles.execute("CREATE TABLE docs AS SELECT 'x' AS body; GRANT SELECT ON docs TO alice")
    roles.execute("CREATE POLICY p ON docs USING (infer((SELECT min(body) FROM docs)) = 'x')")
    roles.execute("ALTER TABLE docs ENABLE ROW LEVEL SECURITY")
    with pytest.raises(errors.InvalidObjectDefinition, match="infinite recursion"):
        alice.execute("SELECT infer(body) FROM docs")
    roles.execute(
        "CREATE FUNCTION count_docs() RETURNS bigint LANGUAGE plpgsql STABLE AS 'BEGIN RETURN (SELECT count(*) FROM docs); END'"
    )
    roles.execute("ALTER POLICY p ON docs USING (infer(count_docs()::text) = 'x')")
    with pytest.raises(errors.StatementTooComplex):
        alice.execute("SELECT infer(body) FROM docs")
    assert alice.execute("SELECT infer('ab')").fetchone() == ("ba",)


# What is the client's reaches the client

NOISY = """
CREATE FUNCTION noisy(x text) RETURNS text LANGUAGE plpgsql STABLE AS
$$ BEGIN RAISE NOTICE USING ERRCODE = 'SKV01', MESSAGE = 'seen ' || x; RETURN x; END $$
"""


def test_notices_and_errors_under_our_own_sqlstates_are_the_clients(alice: Connection, roles: Connection) -> None:
    roles.execute(NOISY.encode())
    notices: list[str] = []
    alice.add_notice_handler(lambda notice: notices.append(f"{notice.sqlstate} {notice.message_primary}"))
    query = "SELECT infer(noisy('n' || i)) FROM generate_series(1, 3) i"
    assert alice.execute(query).fetchall() == [("1n",), ("2n",), ("3n",)]
    assert notices == [f"SKV01 seen n{i}" for i in (1, 2, 3)]
    with pytest.raises(psycopg.Error) as caught:
        alice.execute("DO $$ BEGIN RAISE EXCEPTION 'mine: infer' USING ERRCODE = 'SKV01'; END $$")
    assert (caught.value.sqlstate, caught.value.diag.message_primary) == ("SKV01", "mine: infer")
    assert alice.execute("SELECT infer('ab')").fetchone() == ("ba",)


def test_settings_of_the_client_do_not_stand_in_for_answers(alice: Connection, model: ReversingModel) -> None:
    for name in ("collect", "collecting", "pass", "token", "mode"):
        alice.execute(f"SET stratakv.{name} = 'on'".encode())
    assert alice.execute("SELECT infer('ab')").fetchone() == ("ba",)
    assert [call.role for call in model.calls] == ["alice"]
