"""`stratakv install` and `stratakv uninstall`: infer() and its kin in a user's database."""

from __future__ import annotations

from stratakv.cli.options import ConfigOption, DatabaseOption, SetOption, database_url, read_settings


def install(database: DatabaseOption = None, config: ConfigOption = None, sets: SetOption = None) -> None:
    """Put infer() and its kin into a database; brings older versions up to date."""
    from stratakv import sqlfunctions

    settings = read_settings(config, sets)
    sqlfunctions.install(database_url(database or settings.sql.backend_url, settings))
    print("installed: SELECT infer('…') works for sessions through the DB node")


def uninstall(database: DatabaseOption = None, config: ConfigOption = None, sets: SetOption = None) -> None:
    """Take infer() and its kin out of a database."""
    from stratakv import sqlfunctions

    settings = read_settings(config, sets)
    sqlfunctions.uninstall(database_url(database or settings.sql.backend_url, settings))
    print("uninstalled")
