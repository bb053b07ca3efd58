"""Migrations of the metadata schema: what `stratakv migrate` calls, and the check every service makes at its start.

A schema that is newer than this release is usable as long as it says so: each revision names the oldest revision whose
services may work on it (`compatible`), so that services of the release before go on while others are replaced.

Works from an installed wheel: alembic's configuration and the revisions are in the package `migrations`.
All functions are synchronous; services call `check` in a thread.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.script.revision import ResolutionError
from alembic.util.exc import CommandError
from sqlalchemy import create_engine, inspect, pool, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

import migrations
from stratakv.errors import SetupError

SCHEMA = "stratakv"
VERSION_TABLE = "schema_version"
ADVISORY_LOCK = 0x5354_5241_5441_4B56
"""Held while revisions run; the bytes of STRATAKV."""
LOCK_TIMEOUT_S = 5
"""A revision that waits longer for a table gives up, so that it never blocks a running service behind it."""
TURN_TIMEOUT_S = 60
"""Longest wait for another migration of the same database to finish."""
CONNECT_TIMEOUT_S = 10


@dataclass(frozen=True, slots=True)
class Revision:
    """One step of the schema's history."""

    revision: str
    message: str
    is_current: bool
    is_head: bool


@dataclass(frozen=True, slots=True)
class SchemaState:
    """Where a database is, and whether this release may work on it."""

    current: str | None
    """None if it was never migrated."""
    head: str
    """What this release needs."""
    compatible: str | None
    """The oldest revision whose services may work on it; None before 0009."""
    is_known: bool
    """Whether this release knows the database's revision; it is newer if not."""
    is_newer: bool
    """The database is ahead of this release, which may work on it all the same."""

    @property
    def is_usable(self) -> bool:
        return self.current == self.head or self.is_newer


def sqlalchemy_url(url: str) -> str:
    """A PostgreSQL URL in any usual spelling, for SQLAlchemy with psycopg. Raises SetupError."""
    return _parse(url).render_as_string(hide_password=False)


def driver_url(url: str) -> str:
    """The same URL for asyncpg or libpq. Raises SetupError."""
    parsed = _parse(url)
    query = {name: value for name, value in parsed.query.items() if name != "connect_timeout"}
    return parsed.set(drivername="postgresql", query=query).render_as_string(hide_password=False)


def masked_url(url: str) -> str:
    """The URL as it may be shown: without its password and its options."""
    parsed = _parse(url)
    query = {name: value for name, value in parsed.query.items() if name in ("host", "port")}
    return parsed.set(drivername="postgresql", query=query).render_as_string(hide_password=True)


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the database to `revision`; does nothing if it is there, or newer and usable. Raises SetupError."""
    found = state(url)
    if revision == "head" and found.is_newer:
        return
    _require_known(url, found)
    _require_named(revision)
    _run(url, lambda config: command.upgrade(config, revision))


def downgrade(url: str, revision: str) -> None:
    """Take the database back to `revision` (`base`: before the first). Raises SetupError."""
    _require_known(url, state(url))
    _require_named(revision)
    _run(url, lambda config: command.downgrade(config, revision))


def upgrade_sql(revision: str = "head") -> str:
    """The SQL of an upgrade of an empty database, or of `from:to`, for review or for another tool to run."""
    _require_named(revision)
    return _offline(lambda config: command.upgrade(config, revision, sql=True))


def downgrade_sql(revisions: str) -> str:
    """The SQL of a downgrade `from:to`."""
    _require_named(revisions)
    return _offline(lambda config: command.downgrade(config, revisions, sql=True))


def _offline(step: Callable[[Config], None]) -> str:
    output = io.StringIO()
    try:
        step(_config("", output))
    except (CommandError, ResolutionError) as error:
        raise SetupError(str(error)) from error
    return output.getvalue()


def current(url: str) -> str | None:
    """The database's revision; None if it was never migrated. Raises SetupError if it cannot be reached."""
    return state(url).current


def state(url: str) -> SchemaState:
    """Where the database is. Raises SetupError if it cannot be read."""
    try:
        with create_engine(_parse(url), poolclass=pool.NullPool).connect() as connection:
            options = {"version_table": VERSION_TABLE, "version_table_schema": SCHEMA}
            at = MigrationContext.configure(connection, opts=options).get_current_revision()
            floor = None
            columns = inspect(connection).get_columns(VERSION_TABLE, SCHEMA) if at is not None else []
            if any(column["name"] == "compatible" for column in columns):
                floor = connection.execute(text(f"SELECT compatible FROM {SCHEMA}.{VERSION_TABLE}")).scalar()
    except OperationalError as error:
        raise _unreachable(url, error) from error
    except DBAPIError as error:
        raise SetupError(f"database {masked_url(url)}: {error.orig}") from error
    known = {script.revision for script in _scripts().walk_revisions()}
    is_known = at is None or at in known
    return SchemaState(at, head(), floor, is_known, is_newer=not is_known and floor in known)


def head() -> str:
    """The revision this release needs."""
    revision = _scripts().get_current_head()
    assert revision is not None, "the package migrations has no revision"
    return revision


def history(url: str | None = None) -> list[Revision]:
    """All revisions, oldest first; with a URL, the database's own is marked."""
    at, newest = current(url) if url else None, head()
    scripts = reversed(list(_scripts().walk_revisions()))
    return [Revision(s.revision, s.doc or "", s.revision == at, s.revision == newest) for s in scripts]


def check(url: str) -> SchemaState:
    """Return if services of this release may work on the database. Raises SetupError that says what to run."""
    found = state(url)
    if found.is_usable:
        return found
    where = f"database {masked_url(url)} is at revision {found.current or 'none'}, this release needs {found.head}"
    if found.is_known:
        raise SetupError(f"{where}: run `stratakv migrate upgrade`")
    least = f"; services that work on it need {found.compatible} or later" if found.compatible else ""
    raise SetupError(
        f"{where}{least}: install the release that knows {found.current},"
        " or go back with that release's `stratakv migrate downgrade`",
        hint=f"revision {found.current} is unknown to this release, which is older than the database",
    )


def _require_known(url: str, found: SchemaState) -> None:
    if not found.is_known:
        raise SetupError(
            f"database {masked_url(url)} is at revision {found.current}, which this release does not know",
            hint="use the release that made it: a newer one than this",
        )


def _require_named(revision: str) -> None:
    """alembic ends in an assertion on an empty one, such as a script's variable that is not set."""
    if not revision.strip():
        raise SetupError("no revision is named", hint="`stratakv migrate history` lists them.")


def _run(url: str, step: Callable[[Config], None]) -> None:
    try:
        step(_config(url))
    except OperationalError as error:
        if "lock timeout" in str(error):
            raise SetupError(
                f"database {masked_url(url)}: another session holds a lock that the migration needs",
                hint="end long transactions on the schema stratakv and run the migration again",
            ) from error
        raise _unreachable(url, error) from error
    except DBAPIError as error:
        reason = str(error.orig).strip().splitlines()[0]
        raise SetupError(f"database {masked_url(url)}: {reason}; nothing was changed") from error
    except (CommandError, ResolutionError) as error:
        raise SetupError(f"database {masked_url(url)}: {error}") from error


def _unreachable(url: str, error: OperationalError) -> SetupError:
    reason = str(error.orig).strip().splitlines()[0] if error.orig else "no answer"
    return SetupError(f"cannot connect to database {masked_url(url)}: {reason}")


def _config(url: str, output: io.StringIO | None = None) -> Config:
    path = str(Path(migrations.__file__).with_name("alembic.ini"))
    config = Config(path, output_buffer=output) if output is not None else Config(path)
    # configparser reads % as the start of an interpolation.
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config(""))


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise SetupError("database.url is not a URL; expected postgresql://user:password@host:5432/database") from None
    if parsed.drivername.partition("+")[0] not in ("postgresql", "postgres"):
        raise SetupError(f"database.url: {parsed.drivername} is not supported, only postgresql")
    query = {"connect_timeout": str(CONNECT_TIMEOUT_S), **parsed.query}
    return parsed.set(drivername="postgresql+psycopg", query=query)
