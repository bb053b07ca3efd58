"""The aggregate infer_agg in schema public, and its removal. A function cannot wrap an aggregate, so it is made a second time.

Called by `install`, in its transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stratakv.sqlfunctions.install import Connection

AGGREGATE = "infer_agg"
_SIGNATURES = (
    "instruction text, content text",
    "instruction text, content text, model text",
    "instruction text, content text, model text, options jsonb",
)
_TYPES = ("text, text", "text, text, text", "text, text, text, jsonb")
_INNER = (
    "sql_gather(text[], text, text)",
    "sql_gather(text[], text, text, text)",
    "sql_gather(text[], text, text, text, jsonb)",
    "sql_fold(text[])",
)
_STRANGERS = (
    "SELECT FROM pg_proc p LEFT JOIN pg_aggregate a ON a.aggfnoid = p.oid"
    " WHERE p.proname = 'infer_agg' AND p.pronamespace = to_regnamespace('public')"
    " AND a.aggfinalfn::oid IS DISTINCT FROM to_regprocedure('stratakv.sql_fold(text[])')::oid"
)
"""Functions of that name in public that somebody else has made."""


def make_public_aggregate(connection: Connection) -> bool:
    """Whether public has the aggregate now, and nothing else of its name."""
    found = connection.execute("SELECT to_regnamespace('public') IS NULL").fetchone()
    if found == (True,) or connection.execute(_STRANGERS).fetchone() is not None:
        return False
    for signature, types in zip(_SIGNATURES, _TYPES, strict=True):
        connection.execute(
            f"CREATE OR REPLACE AGGREGATE public.{AGGREGATE}({signature}) (SFUNC = stratakv.sql_gather, STYPE = text[],"
            " FINALFUNC = stratakv.sql_fold, PARALLEL = RESTRICTED)".encode()
        )
        connection.execute(f"COMMENT ON AGGREGATE public.{AGGREGATE}({types}) IS 'stratakv.{AGGREGATE}'".encode())
    return True


def drop_aggregate(connection: Connection, last: str) -> None:
    """Ours in both schemas, with its inner parts. `last` is RESTRICT or CASCADE."""
    schemas = ("public", "stratakv") if connection.execute(_STRANGERS).fetchone() is None else ("stratakv",)
    for schema in schemas:
        for types in _TYPES:
            connection.execute(f"DROP AGGREGATE IF EXISTS {schema}.{AGGREGATE}({types}) {last}".encode())
    for function in _INNER:
        connection.execute(f"DROP FUNCTION IF EXISTS stratakv.{function} {last}".encode())
