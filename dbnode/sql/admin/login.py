"""How a client gets into the admin database: PostgreSQL authenticates it, in another database, and says what it may see."""

from __future__ import annotations

from dataclasses import dataclass, replace
from urllib.parse import unquote, urlsplit

import asyncpg

from dbnode.sql.own_exchange import OwnExchange, OwnStatement, text_columns
from dbnode.sql.startup import StartupPacket
from stratakv.errors import SetupError
from stratakv.log import EventLogger

log = EventLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
_DEFAULT_DATABASE = "postgres"
_HEADER_BYTES = 8
_ASK = OwnStatement(
    "stratakv_gateway_admin",
    b"SELECT session_user, pg_catalog.pg_has_role(session_user, 'pg_monitor', 'USAGE')",
)


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who looks."""

    user: str
    sees_all: bool
    """A superuser, or a member of pg_monitor; others see what is their own."""


def wants_admin(packet: StartupPacket, admin_database: str) -> bool:
    """Whether the client asks for the admin database, by name."""
    return bool(admin_database) and packet.database == admin_database and not packet.is_replication


def login_database(backend_url: str) -> str:
    """A database that exists, to log in to."""
    return unquote(urlsplit(backend_url).path.lstrip("/")) or _DEFAULT_DATABASE


async def check_name(backend_url: str, admin_database: str) -> None:
    """Refuse a name that a database of PostgreSQL's has: it could not be reached any more. Raises SetupError.

    Where PostgreSQL does not let us in by the URL nothing is known, and nothing refused.
    """
    if not admin_database:
        return
    try:
        connection = await asyncpg.connect(backend_url, timeout=CONNECT_TIMEOUT_S)
        try:
            taken = await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", admin_database)
        finally:
            connection.terminate()
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError) as error:
        log.warning("admin_database_unchecked", name=admin_database, error=type(error).__name__)
        return
    if taken:
        raise SetupError(
            f"sql.admin_database: PostgreSQL has a database {admin_database}, which clients could not reach any more",
            hint="Choose another name with STRATAKV_SQL_ADMIN_DATABASE, or none by leaving it empty.",
        )


def with_database(packet: StartupPacket, database: str) -> StartupPacket:
    """The same packet for another database; nothing else in it is touched."""
    words = packet.raw[_HEADER_BYTES:].split(b"\0")[:-2]
    pairs = [(name, value) for name, value in zip(words[::2], words[1::2], strict=True) if name != b"database"]
    pairs.append((b"database", database.encode()))
    body = b"".join(name + b"\0" + value + b"\0" for name, value in pairs) + b"\0"
    length = (_HEADER_BYTES + len(body)).to_bytes(4, "big")
    return replace(packet, raw=length + packet.raw[4:_HEADER_BYTES] + body)


def viewer_exchange() -> OwnExchange:
    """Ask PostgreSQL who has logged in, and what it may see."""
    return OwnExchange([_ASK])


def viewer(exchange: OwnExchange) -> Viewer | None:
    """None if PostgreSQL did not say."""
    if exchange.row is None:
        return None
    user, sees_all = text_columns(exchange.row)
    return Viewer(user or "", sees_all == "t") if user else None
