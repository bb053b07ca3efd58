"""`stratakv sql`: a SQL prompt on the DB node, by psql where there is one; and statements, with their progress."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stratakv.cli.options import (
    ConfigOption,
    SetOption,
    StateFileOption,
    print_json,
    running_settings,
    table_console,
)
from stratakv.errors import SetupError, Unavailable
from stratakv.settings import Settings

if TYPE_CHECKING:
    import psycopg

    from stratakv.cli.sql_progress import ProgressWatch

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def sql(
    context: typer.Context,
    user: Annotated[str | None, typer.Option("--user", "-U", help="PostgreSQL role.")] = None,
    dbname: Annotated[str | None, typer.Option("--dbname", "-d", help="Database.")] = None,
    command: Annotated[
        list[str] | None, typer.Option("--command", "-c", help="Run a statement and leave; repeatable.")
    ] = None,
    progress: Annotated[
        bool | None,
        typer.Option(
            "--progress/--no-progress",
            help="Show how far a statement is; by default with --command on a terminal. Without --command: instead of psql.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows of --command as JSON.")] = False,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
) -> None:
    """Open psql on the DB node, or run statements; further arguments are psql's."""
    from psycopg.conninfo import make_conninfo

    settings = running_settings(config, sets, state_file)
    connection = _connection(settings, user, dbname)
    psql = None if _is_ours(context.args, command, progress, as_json) else _find_psql(settings)
    if psql is None:
        console = Console(stderr=True, quiet=as_json or progress is False or not sys.stdout.isatty())
        admin = settings.sql.admin_database
        _run_here(
            connection, {**connection, "dbname": admin} if admin else None, command or [], console, as_json=as_json
        )
        return
    password = connection.pop("password", None)
    if password is not None:
        os.environ["PGPASSWORD"] = password
    text = make_conninfo(**connection)
    commands = [part for statement in command or () for part in ("--command", statement)]
    arguments = ["--dbname", text, *commands, *context.args]
    os.execv(psql, [psql, *arguments])


def _is_ours(further: list[str], commands: list[str] | None, progress: bool | None, as_json: bool) -> bool:
    """Whether we run the statements ourselves: psql draws no progress, and prints no JSON. Raises SetupError."""
    if as_json and not commands:
        raise SetupError("--json needs --command.", hint="stratakv sql --json -c 'SELECT …'")
    if further or any(statement.lstrip().startswith("\\") for statement in commands or ()):
        if as_json or progress:
            raise SetupError(
                "--json and --progress do not go with what only psql knows.", hint="Leave one of them out."
            )
        return False
    if as_json or progress is not None:
        return as_json or bool(progress)
    return bool(commands) and sys.stdout.isatty() and sys.stderr.isatty()


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


def _run_here(
    connection: dict[str, str], admin: dict[str, str] | None, commands: list[str], progress: Console, *, as_json: bool
) -> None:
    """Statements, or a prompt that takes one a line. Raises Unavailable."""
    import psycopg

    from stratakv.cli.sql_progress import ProgressWatch

    console = table_console()
    try:
        with psycopg.connect(**connection, autocommit=True) as session:  # type: ignore[arg-type]
            watch = ProgressWatch(admin, session.info.backend_pid, progress) if admin is not None else None
            try:
                for statement in commands:
                    if (status := _run(session, statement, console, watch, as_json=as_json)) != 0:
                        raise typer.Exit(status)
                while not commands:
                    try:
                        statement = input(f"{session.info.dbname}=> ").strip()
                    except EOFError:
                        return
                    if statement in ("\\q", "quit", "exit"):
                        return
                    if statement:
                        _run(session, statement, console, watch, as_json=False)
            finally:
                if watch is not None:
                    watch.close()
    except psycopg.OperationalError as error:
        raise Unavailable(f"no SQL session at {connection['host']}:{connection['port']}: {error}") from error


def _run(
    session: psycopg.Connection[tuple[object, ...]],
    statement: str,
    console: Console,
    watch: ProgressWatch | None,
    *,
    as_json: bool,
) -> int:
    """Exit status. Ctrl-C cancels the statement, in PostgreSQL and in the workers."""
    import psycopg

    try:
        with watch.watching() if watch is not None else nullcontext():
            cursor = session.execute(statement.encode())
    except KeyboardInterrupt:
        Console(stderr=True).print("Cancelled.", style="red")
        return EXIT_INTERRUPTED
    except psycopg.Error as error:
        if session.broken:
            raise
        Console(stderr=True).print(f"ERROR: {error}", style="red", markup=False)
        return EXIT_FAILED
    if as_json:
        names = [column.name for column in cursor.description or ()]
        print_json([dict(zip(names, row, strict=True)) for row in cursor.fetchall()] if names else [])
    elif cursor.description is None:
        console.print(cursor.statusmessage or "", markup=False)
    else:
        table = Table(*(column.name for column in cursor.description))
        for row in cursor.fetchall():
            table.add_row(*(Text("" if value is None else str(value)) for value in row))
        console.print(table)
    return 0
