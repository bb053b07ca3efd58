"""How clients reach the PostgreSQL behind the DB node: the node's address, with what the backend's URL says of its clients.

Used by the command line and by `stratakv up`. Keeps nothing.
"""

from __future__ import annotations

from urllib.parse import quote

import psycopg
from psycopg.conninfo import conninfo_to_dict

from stratakv.errors import SetupError
from stratakv.postgres import METADATA_DATABASE, SUPERUSER
from stratakv.process import reachable_host
from stratakv.settings import Settings


def client_parameters(settings: Settings) -> dict[str, str]:
    """libpq parameters: host and port of the DB node; user, password and dbname as far as the backend's URL names them.

    Without any URL, those of the embedded PostgreSQL. Raises SetupError.
    """
    url = settings.sql.backend_url or settings.database.url
    try:
        backend = conninfo_to_dict(url) if url else {"user": SUPERUSER, "dbname": METADATA_DATABASE}
    except psycopg.ProgrammingError as error:
        setting = "sql.backend_url" if settings.sql.backend_url else "database.url"
        raise SetupError(f"{setting} is not a PostgreSQL URL; expected postgresql://user@host:5432/database") from error
    named = {name: str(backend[name]) for name in ("user", "password", "dbname") if backend.get(name)}
    return {"host": reachable_host(settings.sql.host), "port": str(settings.sql.port), **named}


def client_url(settings: Settings) -> str:
    """The same as a URL, without the password. Raises SetupError."""
    named = client_parameters(settings)
    user = f"{quote(named['user'], safe='')}@" if "user" in named else ""
    database = f"/{quote(named['dbname'], safe='')}" if "dbname" in named else ""
    return f"postgresql://{user}{named['host']}:{named['port']}{database}"
