"""What alembic runs around the revisions: one at a time (advisory lock), never waiting long for a table (lock_timeout).

After each revision the schema says which releases may work on it (`stratakv.migrate`, revision 0009).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from alembic import context
from alembic.runtime.migration import MigrationContext, MigrationInfo
from sqlalchemy import Connection, create_engine, pool, text
from sqlalchemy.exc import OperationalError

from stratakv.errors import SetupError
from stratakv.migrate import (
    ADVISORY_LOCK,
    LOCK_TIMEOUT_S,
    SCHEMA,
    TURN_TIMEOUT_S,
    VERSION_TABLE,
    masked_url,
    sqlalchemy_url,
)

_BEGINS_AT = """
DO $$
DECLARE
    revision text;
BEGIN
    IF to_regclass('{schema}.{table}') IS NOT NULL THEN
        EXECUTE 'SELECT version_num FROM {schema}.{table}' INTO revision;
        IF revision IS NULL THEN
            DROP TABLE {schema}.{table};
        END IF;
    END IF;
    IF revision IS DISTINCT FROM {expected} THEN
        RAISE EXCEPTION USING MESSAGE = 'this SQL begins at revision {name}, the database is at ' || coalesce(revision, 'none');
    END IF;
END
$$
"""
"""Before SQL that somebody else runs. What is empty was left by a downgrade to `base`; it would be in the way."""


def _url() -> str:
    return context.config.get_main_option("sqlalchemy.url") or os.environ.get("STRATAKV_DATABASE_URL", "")


def _run_offline() -> None:
    context.configure(
        dialect_name="postgresql",
        # else % would be doubled, as for a driver that takes parameters in that way
        dialect_opts={"paramstyle": "named"},
        literal_binds=True,
        version_table=VERSION_TABLE,
        version_table_schema=SCHEMA,
        on_version_apply=_tell_compatible,
    )
    with context.begin_transaction():
        context.execute(f"SET LOCAL lock_timeout = '{TURN_TIMEOUT_S}s'")
        context.execute(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})")
        context.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S}s'")
        context.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        begin = context.get_context().get_current_revision()
        expected = f"'{begin}'" if begin else "NULL"
        context.execute(_BEGINS_AT.format(schema=SCHEMA, table=VERSION_TABLE, expected=expected, name=begin or "none"))
        context.run_migrations()


def _run_online(connection: Connection) -> None:
    connection.execute(text(f"SET lock_timeout = '{TURN_TIMEOUT_S}s'"))
    try:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": ADVISORY_LOCK})
    except OperationalError as error:
        if "lock timeout" not in str(error):
            raise
        raise SetupError(
            f"database {masked_url(_url())}: another migration has been running for {TURN_TIMEOUT_S} s",
            hint="wait for its end, or end it, and run this one again",
        ) from error
    connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'"))
    connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
    connection.commit()
    context.configure(
        connection=connection,
        version_table=VERSION_TABLE,
        version_table_schema=SCHEMA,
        on_version_apply=_tell_compatible,
    )
    with context.begin_transaction():
        context.run_migrations()


def _tell_compatible(
    ctx: MigrationContext, step: MigrationInfo, heads: Collection[Any], run_args: Mapping[str, Any]
) -> None:
    """Write down the oldest release that may work on the schema as it is after this step."""
    for revision in heads:
        assert ctx.script is not None
        floor = getattr(ctx.script.get_revision(revision).module, "compatible", None)
        if floor is not None:
            ctx.impl.execute(f"UPDATE {SCHEMA}.{VERSION_TABLE} SET compatible = '{floor}'")


if context.is_offline_mode():
    _run_offline()
else:
    # The advisory lock goes with the connection, so a killed migration leaves none behind.
    with create_engine(sqlalchemy_url(_url()), poolclass=pool.NullPool).connect() as _connection:
        _run_online(_connection)
