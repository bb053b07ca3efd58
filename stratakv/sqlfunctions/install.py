"""Installation in one transaction: checks who owns what first, then runs the scripts beside this file."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources

import psycopg
from psycopg import sql

from stratakv.errors import SetupError
from stratakv.sqlfunctions.address import ListenerAddress
from stratakv.sqlfunctions.aggregate import AGGREGATE, drop_aggregate, make_public_aggregate

VERSION = 5
DBLINK_SCHEMA = "stratakv_dblink"
PROBE_SCHEMA = "stratakv_probe"
"""Of what stands in for infer() and its kin while a query is explained."""
_LOCK = 0x5354_5241_5441_0001
"""Advisory lock: one installation at a time."""
_CONNECT_TIMEOUT_S = 10
_LINK_NAME_BYTES = 24
_SERVER_VERSION_MIN = 150_000

_PUBLIC = (
    "infer_json(text, jsonb, text, jsonb)",
    "infer_choice(text, text[], text, jsonb)",
    "infer_bool(text, text, jsonb)",
    "infer_tokens(text, text)",
    "infer_row(text, jsonb, text, jsonb)",
    "infer_fold(text, text[], text, jsonb)",
    "infer(text, text, jsonb)",
    "infer_chat(text, text, jsonb)",
)
"""What users call; each gets a wrapper in public where its name is free."""
_FUNCTIONS = (
    *_PUBLIC,
    "explain(text)",
    "explain_json(text)",
    "sql_explain(text)",
    "sql_own_names()",
    "sql_explain_begin(text, text[])",
    "sql_explain_end(text, bigint)",
    "sql_statement_stats()",
    "create_conversation(text, jsonb)",
    "fork_conversation(text, text)",
    "delete_conversation(text)",
    "conversation_items(text)",
    "sql_my_usage()",
    "sql_my_requests()",
    "sql_my_limits()",
    "sql_ask_node(text, jsonb)",
    "sql_call(text)",
    "sql_caller_word(text)",
    "sql_caller()",
    "sql_fill_template(text, jsonb)",
    "bind(text, text)",
    "sql_ask(text, text)",
    "sql_connect(text, text)",
    "sql_check_dblink()",
)
"""All of them; whoever calls others comes before those."""

_OWN_VIEWS = ("stratakv.my_usage", "stratakv.my_requests", "stratakv.my_limits")
"""Where the metadata are, views of these names belong to them."""

Connection = psycopg.Connection[tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class Installed:
    """What an installation left in the database."""

    version: int
    dblink_schema: str
    names_taken: tuple[str, ...]
    """Something else in schema public has this name; only the function in schema stratakv is there."""


class NotAllowed(SetupError):
    """The role may not install."""


def install(url: str, listener: ListenerAddress) -> Installed:
    """Install or renew the functions; `listener` becomes the default one. Idempotent. Raises NotAllowed, SetupError."""
    with _transaction(url) as connection:
        _check_server(connection)
        _make_schema(connection, "stratakv")
        _make_schema(connection, PROBE_SCHEMA)
        dblink = _make_dblink(connection)
        for script in _scripts():
            connection.execute(script.replace("@dblink@", sql.Identifier(dblink).as_string(connection)).encode())
        _write_tables(connection, listener)
        taken = [_name(function) for function in _PUBLIC if not _make_wrapper(connection, function)]
        if not make_public_aggregate(connection):
            taken.append(AGGREGATE)
        return Installed(VERSION, dblink, tuple(taken))


def is_installed(url: str) -> bool:
    """Whether the database has the functions, whoever put them there. Raises SetupError."""
    with _transaction(url) as connection:
        found = connection.execute(
            "SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace"
            " WHERE n.nspname = 'stratakv' AND p.proname = 'infer'"
        ).fetchone()
        return found is not None


def uninstall(url: str, *, cascade: bool = False) -> None:
    """Take everything out; with `cascade` also views and others that use it. Idempotent. Raises SetupError."""
    last = "CASCADE" if cascade else "RESTRICT"
    with _transaction(url) as connection:
        _drop_probes(connection, last)
        drop_aggregate(connection, last)
        for function in _PUBLIC:
            if _is_our_wrapper(connection, function):
                connection.execute(f"DROP FUNCTION public.{function} {last}".encode())
        connection.execute(f"DROP VIEW IF EXISTS stratakv.statement_stats {last}".encode())
        if not _has_metadata(connection):
            connection.execute(f"DROP VIEW IF EXISTS {', '.join(_OWN_VIEWS)} {last}".encode())
        for function in _FUNCTIONS:
            connection.execute(f"DROP FUNCTION IF EXISTS stratakv.{function} {last}".encode())
        connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {}").format(sql.Identifier(PROBE_SCHEMA)))
        connection.execute(b"DROP TABLE IF EXISTS stratakv.sql_listeners, stratakv.sql_install")
        if _dblink_schema(connection) == DBLINK_SCHEMA:
            connection.execute(b"DROP EXTENSION dblink")
            connection.execute(sql.SQL("DROP SCHEMA {}").format(sql.Identifier(DBLINK_SCHEMA)))
        if _schema_is_empty(connection):
            connection.execute(b"DROP SCHEMA IF EXISTS stratakv")


def _drop_probes(connection: Connection, last: str) -> None:
    """Those that call others come before those."""
    rows = connection.execute(
        "SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = to_regnamespace(%s)"
        " ORDER BY prokind <> 'a', proname <> 'sql_fold', proname = 'infer'",
        (PROBE_SCHEMA,),
    ).fetchall()
    for row in rows:
        connection.execute(f"DROP ROUTINE {row[0]} {last}".encode())


@contextmanager
def _transaction(url: str) -> Iterator[Connection]:
    try:
        with psycopg.connect(url, connect_timeout=_CONNECT_TIMEOUT_S, client_encoding="utf8") as connection:
            connection.execute("SET LOCAL search_path = pg_catalog, pg_temp")
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            yield connection
    except psycopg.errors.DependentObjectsStillExist as error:
        raise SetupError(
            f"others use the functions: {error.diag.message_detail or error}", hint="drop those first, or use --cascade"
        ) from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise NotAllowed(
            f"this role may not do that: {error.diag.message_primary}",
            hint="connect as a superuser, or as the role that may create extensions on a managed PostgreSQL",
        ) from error
    except psycopg.Error as error:
        raise SetupError(f"the database refused: {str(error).strip()}") from error


def _scripts() -> Iterator[str]:
    """In the order in which they are run."""
    yield _resource("install.sql")
    yield _resource("typed.sql")
    yield _resource("agg.sql")
    yield _resource("explain.sql")
    # the same wrappers around the stand-in
    yield _resource("typed.sql").replace("stratakv.infer", f"{PROBE_SCHEMA}.infer")
    around_probe = _resource("agg.sql").replace("stratakv.infer", f"{PROBE_SCHEMA}.infer")
    yield around_probe.replace("stratakv.sql_fold", f"{PROBE_SCHEMA}.sql_fold")
    yield _resource("observe.sql")
    yield _resource("conversations.sql")


def _resource(name: str) -> str:
    return (resources.files("stratakv.sqlfunctions") / name).read_text()


def _check_server(connection: Connection) -> None:
    if connection.info.server_version < _SERVER_VERSION_MIN:
        version = connection.info.parameter_status("server_version")
        raise SetupError(f"the server is PostgreSQL {version}, which is too old", hint="use PostgreSQL 15 or newer")


def _make_schema(connection: Connection, name: str) -> None:
    """Whoever may create or replace things in the schema could act as everybody who calls infer()."""
    connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(name)))
    stranger = connection.execute(
        "SELECT r.rolname FROM pg_namespace n JOIN pg_roles r ON r.oid = n.nspowner"
        " WHERE n.nspname = %(name)s AND r.rolname <> current_user AND NOT r.rolsuper"
        " UNION ALL"
        " SELECT coalesce(r.rolname, 'PUBLIC') FROM pg_namespace n CROSS JOIN LATERAL aclexplode(n.nspacl) a"
        " LEFT JOIN pg_roles r ON r.oid = a.grantee WHERE n.nspname = %(name)s AND a.privilege_type = 'CREATE'"
        " AND r.rolname IS DISTINCT FROM current_user AND NOT coalesce(r.rolsuper, false)",
        {"name": name},
    ).fetchone()
    if stranger:
        raise SetupError(
            f"role {stranger[0]} may create objects in schema {name}",
            hint="let the installing role own the schema, and revoke CREATE on it from all others",
        )


def _dblink_schema(connection: Connection) -> str | None:
    row = connection.execute(
        "SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'dblink'"
    ).fetchone()
    return str(row[0]) if row else None


_DBLINK_FUNCTIONS = (
    "SELECT p.oid, p.proacl, p.proowner FROM pg_extension e"
    " JOIN pg_depend d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND d.deptype = 'e'"
    " JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid WHERE e.extname = 'dblink'"
)


def _make_dblink(connection: Connection) -> str:
    """The schema of dblink, which nobody but us and superusers may execute."""
    schema = _dblink_schema(connection)
    if schema is None:
        name = sql.Identifier(DBLINK_SCHEMA)
        connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(name))
        connection.execute(sql.SQL("CREATE EXTENSION dblink SCHEMA {}").format(name))
        connection.execute(sql.SQL("REVOKE ALL ON ALL FUNCTIONS IN SCHEMA {} FROM PUBLIC").format(name))
        schema = DBLINK_SCHEMA
    rows = connection.execute(
        "SELECT DISTINCT coalesce(quote_ident(r.rolname), 'PUBLIC') FROM (" + _DBLINK_FUNCTIONS + ") f"
        " CROSS JOIN LATERAL aclexplode(coalesce(f.proacl, acldefault('f', f.proowner))) a"
        " LEFT JOIN pg_roles r ON r.oid = a.grantee"
        " WHERE r.rolname IS DISTINCT FROM current_user AND NOT coalesce(r.rolsuper, false) ORDER BY 1"
    ).fetchall()
    if rows:
        grantees = ", ".join(str(row[0]) for row in rows)
        where = sql.Identifier(schema).as_string(connection)
        raise SetupError(
            f"the extension dblink is installed in schema {schema}, and its functions may be executed by {grantees}: "
            "such a role could call infer() as anybody",
            hint=f"REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA {where} FROM {grantees};"
            if schema == DBLINK_SCHEMA
            else _revoke_statements(connection, grantees),
        )
    return schema


def _revoke_statements(connection: Connection, grantees: str) -> str:
    """One statement that takes dblink, and nothing else in its schema, from `grantees`."""
    rows = connection.execute(
        "SELECT f.oid::regprocedure::text FROM (" + _DBLINK_FUNCTIONS + ") f ORDER BY 1"
    ).fetchall()
    return f"REVOKE EXECUTE ON FUNCTION {', '.join(str(row[0]) for row in rows)} FROM {grantees};"


def _write_tables(connection: Connection, listener: ListenerAddress) -> None:
    connection.execute(
        "INSERT INTO stratakv.sql_install (version, connection_name) VALUES (%s, %s)"
        " ON CONFLICT (one) DO UPDATE SET version = excluded.version",
        (VERSION, f"stratakv_{secrets.token_hex(_LINK_NAME_BYTES)}"),
    )
    connection.execute("UPDATE stratakv.sql_listeners SET is_default = false WHERE is_default")
    connection.execute(
        "INSERT INTO stratakv.sql_listeners (name, conninfo, is_default) VALUES (%s, %s, true)"
        " ON CONFLICT (name) DO UPDATE SET conninfo = excluded.conninfo, is_default = true",
        (listener.name, listener.conninfo(connection.info.server_version)),
    )


def _name(function: str) -> str:
    return function.partition("(")[0]


def _is_our_wrapper(connection: Connection, function: str) -> bool:
    return bool(
        connection.execute(
            "SELECT 1 FROM pg_proc WHERE oid = to_regprocedure(%s) AND strpos(prosrc, %s) > 0",
            (f"public.{function}", f"stratakv.{_name(function)}("),
        ).fetchone()
    )


def _make_wrapper(connection: Connection, function: str) -> bool:
    """Whether public has the function now. No SET and no SECURITY DEFINER in it, so that the planner inlines it."""
    name = _name(function)
    taken = connection.execute(
        "SELECT 1 FROM pg_proc WHERE proname = %s AND pronamespace = to_regnamespace('public')", (name,)
    ).fetchone()
    no_public = connection.execute("SELECT to_regnamespace('public') IS NULL").fetchone()
    if no_public == (True,) or (taken and not _is_our_wrapper(connection, function)):
        return False
    row = connection.execute(
        "SELECT format('CREATE OR REPLACE FUNCTION public.%%I(%%s) RETURNS %%s "
        "LANGUAGE sql %%s PARALLEL RESTRICTED COST 1000 AS %%L', proname, pg_get_function_arguments(oid),"
        " pg_get_function_result(oid), CASE provolatile WHEN 'v' THEN 'VOLATILE' ELSE 'STABLE' END,"
        " format('SELECT stratakv.%%I(%%s)', proname,"
        " (SELECT string_agg('$' || i, ', ' ORDER BY i) FROM generate_series(1, pronargs) i)))"
        " FROM pg_proc WHERE oid = to_regprocedure(%s)",
        (f"stratakv.{function}",),
    ).fetchone()
    assert row is not None
    connection.execute(str(row[0]).encode())
    connection.execute(f"COMMENT ON FUNCTION public.{function} IS 'stratakv.{name}'".encode())
    return True


def _has_metadata(connection: Connection) -> bool:
    return connection.execute("SELECT to_regclass('stratakv.schema_version') IS NOT NULL").fetchone() == (True,)


def _schema_is_empty(connection: Connection) -> bool:
    row = connection.execute(
        "SELECT NOT EXISTS (SELECT FROM pg_depend WHERE refclassid = 'pg_namespace'::regclass"
        " AND refobjid = to_regnamespace('stratakv'))"
    ).fetchone()
    return row == (True,)
