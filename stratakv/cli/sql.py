"""`stratakv sql`: a SQL prompt on the DB node, by psql where there is one."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from stratakv.cli.options import ConfigOption, SetOption, StateFileOption, running_settings, table_console
from stratakv.errors import SetupError, Unavailable
from stratakv.settings import Settings

if TYPE_CHECKING:
    import psycopg

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def sql(
    context: typer.Context,
    user: Annotated[str | None, typer.Option("--user", "-U", help="PostgreSQL role.")] = None,
    dbname: Annotated[str | None, typer.Option("--dbname", "-d", help="Database.")] = None,
    command: Annotated[
        list[str] | None, typer.Option("--command", "-c", help="Run a statement and leave; repeatable.")
    ] = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
) -> None:
    """Open psql on the DB node; further arguments are psql's."""
    from psycopg.conninfo import make_conninfo

    settings = running_settings(config, sets, state_file)
    connection = _connection(settings, user, dbname)
    psql = _find_psql(settings)
    if psql is None:
        _prompt(connection, command or [])
        return
    password = connection.pop("password", None)
    if password is not None:
        os.environ["PGPASSWORD"] = password
    text = make_conninfo(**connection)
    commands = [part for statement in command or () for part in ("--command", statement)]
    arguments = ["--dbname", text, *commands, *context.args]
    os.execv(psql, [psql, *arguments])


def _connection(settings: Settings, user: str | None, dbname: str | None) -> dict[str, str]:
    """Connection parameters; the backend's password is its own role's."""
    from stratakv.backend import client_parameters

    found = client_parameters(settings)
    if user is not None:
        found["user"] = user
        found.pop("password", None)
    if dbname is not None:
        found["dbname"] = dbname
    return found


def _find_psql(settings: Settings) -> str | None:
    from stratakv.postgres import find_binaries

    on_path = shutil.which("psql")
    if on_path:
        return on_path
    try:
        return shutil.which(find_binaries(settings.postgres.bin).program("psql"))
    except SetupError:
        return None


def _prompt(connection: dict[str, str], commands: list[str]) -> None:
    """A prompt for machines without psql: one statement a line."""
    import psycopg

    console = table_console()
    try:
        with psycopg.connect(**connection, autocommit=True) as session:  # type: ignore[arg-type]
            for statement in commands:
                _run(session, statement, console)
            while not commands:
                try:
                    statement = input(f"{session.info.dbname}=> ").strip()
                except EOFError:
                    return
                if statement in ("\\q", "quit", "exit"):
                    return
                if statement:
                    _run(session, statement, console)
    except psycopg.OperationalError as error:
        raise Unavailable(f"no SQL session at {connection['host']}:{connection['port']}: {error}") from error


def _run(session: psycopg.Connection[tuple[object, ...]], statement: str, console: Console) -> None:
    import psycopg

    try:
        cursor = session.execute(statement.encode())
    except psycopg.OperationalError:
        raise
    except psycopg.Error as error:
        console.print(f"ERROR: {error}", style="red", markup=False)
        return
    if cursor.description is None:
        console.print(cursor.statusmessage or "", markup=False)
        return
    table = Table(*(column.name for column in cursor.description))
    for row in cursor.fetchall():
        table.add_row(*("" if value is None else str(value) for value in row))
    console.print(table, markup=False)
