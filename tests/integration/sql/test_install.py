"""Installation: repeatable, removable, and refused where it would not be safe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from stratakv.errors import SetupError
from stratakv.postgres import EmbeddedPostgres
from stratakv.sqlfunctions import ListenerAddress, install, uninstall
from stratakv.sqlfunctions.install import VERSION
from tests.integration.sql.harness import FrontThread

ADDRESS = ListenerAddress("/nowhere", 6433, "key")


@pytest.fixture
def empty(cluster: EmbeddedPostgres) -> Iterator[str]:
    """URL of a database without anything in it."""
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE empty_one")
        yield cluster.database_url("empty_one")
        admin.execute("DROP DATABASE empty_one WITH (FORCE)")


def _objects(url: str) -> list[tuple[object, ...]]:
    query = """SELECT nspname, 'schema' FROM pg_namespace WHERE nspname !~ '^pg_|information_schema'
        UNION ALL SELECT p.oid::regprocedure::text, 'function' FROM pg_proc p
            JOIN pg_namespace n ON n.oid = pronamespace WHERE nspname !~ '^pg_|information_schema'
        UNION ALL SELECT extname, 'extension' FROM pg_extension ORDER BY 2, 1"""
    with psycopg.connect(url) as connection:
        return connection.execute(query).fetchall()


def test_uninstall_leaves_nothing_and_both_may_be_repeated(empty: str) -> None:
    before = _objects(empty)
    first = install(empty, ADDRESS)
    assert (first.version, first.dblink_schema, first.names_taken) == (VERSION, "stratakv_dblink", ())
    assert install(empty, ADDRESS) == first
    for _ in range(2):
        uninstall(empty)
        assert _objects(empty) == before


def test_metadata_in_the_same_schema_stays(empty: str) -> None:
    with psycopg.connect(empty) as connection:
        connection.execute("CREATE SCHEMA stratakv; CREATE TABLE stratakv.tenants (id int)")
    install(empty, ADDRESS)
    uninstall(empty)
    with psycopg.connect(empty) as connection:
        assert connection.execute("SELECT count(*) FROM stratakv.tenants").fetchone() == (0,)


def test_another_listener_becomes_the_default_and_the_first_stays_known(empty: str) -> None:
    install(empty, ADDRESS)
    install(empty, ListenerAddress("127.0.0.1", 7000, "other"))
    with psycopg.connect(empty) as connection:
        rows = connection.execute("SELECT name, is_default FROM stratakv.sql_listeners ORDER BY 1").fetchall()
    assert rows == [("/nowhere:6433", False), ("127.0.0.1:7000", True)]


def test_version_1_is_brought_up_to_date_in_place(empty: str) -> None:
    install(empty, ADDRESS)
    kept = "SELECT oid, connection_name FROM pg_proc, stratakv.sql_install WHERE oid = 'stratakv.infer'::regproc"
    with psycopg.connect(empty) as connection:
        for schema in ("public", "stratakv"):
            for name in ("infer_json", "infer_choice", "infer_bool", "infer_tokens", "infer_row"):
                connection.execute(f"DROP FUNCTION {schema}.{name}".encode())
        connection.execute("DROP SCHEMA stratakv_probe CASCADE")
        connection.execute("DROP FUNCTION stratakv.sql_fill_template; UPDATE stratakv.sql_install SET version = 1")
        connection.execute("CREATE VIEW answers AS SELECT infer('x') AS a, stratakv.infer('y') AS b")
        before = connection.execute(kept).fetchone()
    assert install(empty, ADDRESS).version == VERSION
    with psycopg.connect(empty) as connection:
        assert connection.execute(kept).fetchone() == before
        assert connection.execute("SELECT version FROM stratakv.sql_install").fetchone() == (VERSION,)
        assert connection.execute("SELECT infer_row(NULL, '{}')").fetchone() == (None,)


def test_version_2_is_brought_up_to_date_in_place(empty: str) -> None:
    install(empty, ADDRESS)
    names = "'infer', 'infer_json', 'infer_choice', 'infer_bool', 'infer_tokens', 'infer_row', 'sql_fill_template'"
    where = f"proname IN ({names}) AND pronamespace IN ('stratakv'::regnamespace, 'public'::regnamespace)"
    kept = f"SELECT oid FROM pg_proc WHERE {where} ORDER BY oid".encode()
    with psycopg.connect(empty) as connection:
        connection.execute("DROP SCHEMA stratakv_probe CASCADE")
        for schema in ("public", "stratakv"):
            for types in ("text, text", "text, text, text", "text, text, text, jsonb"):
                connection.execute(f"DROP AGGREGATE {schema}.infer_agg({types})".encode())
        connection.execute(
            "DROP FUNCTION stratakv.sql_fold, stratakv.infer_fold, public.infer_fold;"
            "DROP FUNCTION stratakv.sql_gather(text[], text, text);"
            "DROP FUNCTION stratakv.sql_gather(text[], text, text, text);"
            "DROP FUNCTION stratakv.sql_gather(text[], text, text, text, jsonb);"
            "CREATE OR REPLACE FUNCTION stratakv.sql_fill_template(template text, fields jsonb) RETURNS text"
            " LANGUAGE sql IMMUTABLE AS 'SELECT template';"
            "CREATE OR REPLACE FUNCTION stratakv.infer_row(template text, fields jsonb, model text DEFAULT NULL,"
            " options jsonb DEFAULT NULL) RETURNS text LANGUAGE sql STABLE PARALLEL RESTRICTED COST 1000"
            " RETURN stratakv.infer(stratakv.sql_fill_template(template, fields), model, options);"
            "UPDATE stratakv.sql_install SET version = 2;"
            "CREATE VIEW answers AS SELECT infer_row('{a}', '{\"a\": 1}') AS a"
        )
        before = connection.execute(kept).fetchall()
    assert install(empty, ADDRESS).version == VERSION
    with psycopg.connect(empty) as connection:
        assert connection.execute(kept).fetchall() == before
        assert connection.execute("SELECT version FROM stratakv.sql_install").fetchone() == (VERSION,)
        prompt = connection.execute(
            "SELECT stratakv.sql_fill_template('{a}!', '{\"a\": 1}')::jsonb->'before'"
        ).fetchone()
        assert prompt == ("1!",)
        assert connection.execute("SELECT infer_agg('x', NULL) FROM answers WHERE false").fetchone() == (None,)


def test_name_that_is_taken_in_public_is_left_alone(empty: str) -> None:
    with psycopg.connect(empty) as connection:
        connection.execute("CREATE FUNCTION public.infer(int) RETURNS int LANGUAGE sql AS 'SELECT 1'")
    assert install(empty, ADDRESS).names_taken == ("infer",)
    uninstall(empty)
    with psycopg.connect(empty) as connection:
        assert connection.execute("SELECT infer(5)").fetchone() == (1,)


def test_dblink_that_everybody_may_use_stops_installation_and_the_hint_mends_it(empty: str) -> None:
    with psycopg.connect(empty) as connection:
        connection.execute("CREATE SCHEMA extensions; CREATE EXTENSION dblink SCHEMA extensions")
    with pytest.raises(SetupError, match="executed by PUBLIC") as caught:
        install(empty, ADDRESS)
    assert caught.value.hint is not None
    with psycopg.connect(empty) as connection:
        connection.execute(caught.value.hint.encode())
    assert install(empty, ADDRESS).dblink_schema == "extensions"
    uninstall(empty)
    assert ("dblink", "extension") in _objects(empty)


def test_schema_of_a_stranger_stops_installation(empty: str) -> None:
    with psycopg.connect(empty, autocommit=True) as connection:
        connection.execute("CREATE ROLE squatter; CREATE SCHEMA stratakv AUTHORIZATION squatter")
        try:
            with pytest.raises(SetupError, match="squatter"):
                install(empty, ADDRESS)
            connection.execute(
                "ALTER SCHEMA stratakv OWNER TO CURRENT_USER; GRANT CREATE ON SCHEMA stratakv TO squatter"
            )
            with pytest.raises(SetupError, match="squatter"):
                install(empty, ADDRESS)
        finally:
            connection.execute("DROP OWNED BY squatter CASCADE; DROP ROLE squatter")


def test_views_that_use_infer_hold_uninstall_back_until_asked(empty: str) -> None:
    install(empty, ADDRESS)
    with psycopg.connect(empty) as connection:
        connection.execute("CREATE VIEW answers AS SELECT public.infer('x')")
    with pytest.raises(SetupError, match="answers"):
        uninstall(empty)
    uninstall(empty, cascade=True)
    assert not any("infer" in str(row[0]) for row in _objects(empty))


def test_ordinary_role_is_told_that_it_may_not_install(empty: str, cluster: EmbeddedPostgres) -> None:
    with psycopg.connect(empty, autocommit=True) as connection:
        connection.execute("CREATE ROLE plain LOGIN")
        with pytest.raises(SetupError, match="may not"):
            install(empty.replace("postgres@", "plain@"), ADDRESS)
        connection.execute("DROP ROLE plain")


def test_unreachable_database_is_a_setup_error(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="refused"):
        install(f"postgresql://postgres@/x?host={tmp_path}", ADDRESS)


def test_call_without_a_node_says_so(empty: str, front: FrontThread) -> None:
    install(empty, front.front.address)
    with psycopg.connect(empty, autocommit=True) as connection:
        connection.execute("DELETE FROM stratakv.sql_listeners")
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="no DB node"):
            connection.execute("SELECT stratakv.infer('x')")
