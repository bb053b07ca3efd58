"""`stratakv install` and `stratakv uninstall`: infer() and its kin in a user's database."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from stratakv.cli.options import (
    ConfigOption,
    DatabaseOption,
    JsonOption,
    SetOption,
    StateFileOption,
    database_url,
    print_json,
    read_settings,
    running_settings,
)
from stratakv.settings import Secret, Settings

if TYPE_CHECKING:
    from stratakv.sqlfunctions import ListenerAddress


def install(
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put infer() and its kin into a database; brings older versions up to date."""
    from stratakv import sqlfunctions
    from stratakv.migrate import masked_url

    settings = running_settings(config, sets, state_file)
    url = database_url(database or settings.sql.backend_url, settings)
    done = sqlfunctions.install(url, _listener(settings))
    if as_json:
        taken = list(done.names_taken)
        print_json({"version": done.version, "dblink_schema": done.dblink_schema, "names_taken": taken})
        return
    print(f"infer() and its kin, version {done.version}, installed in {masked_url(url)}")
    for name in done.names_taken:
        print(f"{name}() only as stratakv.{name}(): something else has the name public.{name}")


def _listener(settings: Settings) -> ListenerAddress:
    """Where infer() shall call back to; the key is the one that `stratakv up` keeps if the settings name none."""
    from stratakv.sqlfunctions import KEY_FILE, ListenerAddress, kept_key

    sql = settings.sql
    home = settings.up.data_dir.expanduser()
    if sql.listener_dir is None and sql.listener_key is None and (home / KEY_FILE).exists():
        sql = replace(sql, listener_key=Secret(kept_key(home)))
    return ListenerAddress.from_settings(sql)


def uninstall(
    database: DatabaseOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    cascade: Annotated[
        bool, typer.Option("--cascade", help="Also drop views and others that use the functions.")
    ] = False,
) -> None:
    """Take infer() and its kin out of a database."""
    from stratakv import sqlfunctions
    from stratakv.migrate import masked_url

    settings = read_settings(config, sets)
    url = database_url(database or settings.sql.backend_url, settings)
    sqlfunctions.uninstall(url, cascade=cascade)
    print(f"uninstalled from {masked_url(url)}")
