"""What alembic runs around the revisions: one at a time (advisory lock), never waiting long for a table (lock_timeout)."""

from __future__ import annotations

import os

from alembic import context
from sqlalchemy import Connection, create_engine, pool, text

from stratakv.migrate import (
    ADVISORY_LOCK,
    LOCK_TIMEOUT_S,
    SCHEMA,
    TURN_TIMEOUT_S,
    VERSION_TABLE,
    sqlalchemy_url,
)


def _url() -> str:
    url = context.config.get_main_option("sqlalchemy.url") or os.environ.get("STRATAKV_DATABASE_URL", "")
    return sqlalchemy_url(url)


def _run_offline() -> None:
    context.configure(
        dialect_name="postgresql", literal_binds=True, version_table=VERSION_TABLE, version_table_schema=SCHEMA
    )
    with context.begin_transaction():
        context.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        context.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S}s'")
        context.run_migrations()


def _run_online(connection: Connection) -> None:
    connection.execute(text(f"SET lock_timeout = '{TURN_TIMEOUT_S}s'"))
    connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": ADVISORY_LOCK})
    connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'"))
    connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
    connection.commit()
    context.configure(connection=connection, version_table=VERSION_TABLE, version_table_schema=SCHEMA)
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    _run_offline()
else:
    # The advisory lock goes with the connection, so a killed migration leaves none behind.
    with create_engine(_url(), poolclass=pool.NullPool).connect() as _connection:
        _run_online(_connection)
