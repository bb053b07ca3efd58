"""`stratakv install` and `stratakv uninstall`: infer() and its kin in a user's database."""

from __future__ import annotations

from typing import Annotated

import typer

from stratakv.cli.options import (
    ConfigOption,
    DatabaseOption,
    JsonOption,
    SetOption,
    database_url,
    print_json,
    read_settings,
)


def install(
    database: DatabaseOption = None, config: ConfigOption = None, sets: SetOption = None, as_json: JsonOption = False
) -> None:
    """Put infer() and its kin into a database; brings older versions up to date."""
    from stratakv import sqlfunctions
    from stratakv.migrate import masked_url

    settings = read_settings(config, sets)
    url = database_url(database or settings.sql.backend_url, settings)
    done = sqlfunctions.install(url, sqlfunctions.ListenerAddress.from_settings(settings.sql))
    if as_json:
        taken = list(done.names_taken)
        print_json({"version": done.version, "dblink_schema": done.dblink_schema, "names_taken": taken})
        return
    print(f"infer() and its kin, version {done.version}, installed in {masked_url(url)}")
    for name in done.names_taken:
        print(f"{name}() only as stratakv.{name}(): something else has the name public.{name}")


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
