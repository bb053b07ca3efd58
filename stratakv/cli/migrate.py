"""`stratakv migrate`: the schema of the metadata.

alembic takes a third of a second to import, so only the commands that run do it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from stratakv.cli.options import (
    ConfigOption,
    DatabaseOption,
    JsonOption,
    SetOption,
    database_url,
    print_json,
    read_settings,
    table_console,
)

if TYPE_CHECKING:
    from stratakv.migrate import SchemaState

app = typer.Typer(help="The metadata's schema: upgrade, downgrade, current, history, check.", no_args_is_help=True)

SqlOption = Annotated[
    bool,
    typer.Option(
        "--sql",
        help="Print the SQL instead of running it; with --database that from where the database is, else all of it.",
    ),
]


@app.command()
def upgrade(
    revision: Annotated[str, typer.Argument(help="Where to go, or from:to with --sql.")] = "head",
    database: DatabaseOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    sql: SqlOption = False,
) -> None:
    """Bring the database to a revision, by default the newest."""
    from stratakv import migrate as migrations

    if sql:
        print(migrations.upgrade_sql(_from_database(database, revision)))
        return
    url = database_url(database, read_settings(config, sets))
    migrations.upgrade(url, revision)
    print(_where(url))


@app.command()
def downgrade(
    revision: Annotated[str, typer.Argument(help="Where to go (`base`: before the first), or from:to with --sql.")],
    database: DatabaseOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    sql: SqlOption = False,
) -> None:
    """Take the database back to a revision."""
    from stratakv import migrate as migrations

    if sql:
        print(migrations.downgrade_sql(_from_database(database, revision)))
        return
    url = database_url(database, read_settings(config, sets))
    migrations.downgrade(url, revision)
    print(_where(url))


@app.command()
def current(
    database: DatabaseOption = None, config: ConfigOption = None, sets: SetOption = None, as_json: JsonOption = False
) -> None:
    """The database's revision and the one this release needs."""
    from stratakv import migrate as migrations

    found = migrations.state(database_url(database, read_settings(config, sets)))
    if as_json:
        print_json(
            {"current": found.current, "head": found.head, "compatible": found.compatible, "usable": found.is_usable}
        )
    else:
        print(f"{found.current or 'none'} (this release needs {found.head}{_newer(found)})")


@app.command()
def history(
    database: DatabaseOption = None, config: ConfigOption = None, sets: SetOption = None, as_json: JsonOption = False
) -> None:
    """All revisions, oldest first; the database's own is marked if one is named."""
    from stratakv import migrate as migrations

    url = database or read_settings(config, sets).database.url
    revisions = migrations.history(url)
    if as_json:
        print_json(
            [
                {"revision": r.revision, "message": r.message, "current": r.is_current, "head": r.is_head}
                for r in revisions
            ]
        )
        return
    table = Table("revision", "what it does", "")
    for revision in revisions:
        marks = [name for name, here in (("current", revision.is_current), ("head", revision.is_head)) if here]
        table.add_row(revision.revision, revision.message, ", ".join(marks))
    table_console().print(table)


@app.command()
def check(database: DatabaseOption = None, config: ConfigOption = None, sets: SetOption = None) -> None:
    """Exit 0 if services of this release may work on the database, else 2."""
    from stratakv import migrate as migrations

    found = migrations.check(database_url(database, read_settings(config, sets)))
    print(f"the database is at revision {found.current}{_newer(found)}")


def _where(url: str) -> str:
    from stratakv import migrate as migrations

    found = migrations.state(url)
    return f"{migrations.masked_url(url)} is at revision {found.current or 'none'}{_newer(found)}"


def _newer(found: SchemaState) -> str:
    return f", newer than this release, whose {found.head} may work on it" if found.is_newer else ""


def _from_database(database: str | None, revision: str) -> str:
    """`revision`, from where the database is, if one was named and the revision does not say itself."""
    from stratakv import migrate as migrations

    if database is None or ":" in revision:
        return revision
    return f"{migrations.current(database) or 'base'}:{revision}"
