"""What a suite is run against: a throw-away PostgreSQL, reached directly or through the DB node's SQL face."""

from __future__ import annotations

import enum
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import PostgresSettings
from stratakv.sqlfunctions import install
from tests.integration.sql.harness import ReversingModel, address_in, front_thread
from tests.support import free_port

CLIENTS_MAX = 500
DATABASE = "postgres"
_FUNCTIONS_DATABASE = "functions"
"""No suite looks at it: what they would find there is not the relay's."""
_SERVER_OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "max_prepared_transactions": "10",
    "wal_level": "logical",
    "jit": "off",
}
"""Of both sides. Prepared transactions and logical decoding are tested by several suites."""


class Side(enum.StrEnum):
    """How the server is reached."""

    DIRECT = "direct"
    GATEWAY = "gateway"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a suite connects, without a password."""

    port: int
    host: str = "127.0.0.1"
    user: str = "postgres"
    database: str = DATABASE

    def url(self, scheme: str = "postgresql") -> str:
        return f"{scheme}://{self.user}@{self.host}:{self.port}/{self.database}"

    def libpq_environment(self) -> dict[str, str]:
        """The variables that libpq and asyncpg read."""
        return {"PGHOST": self.host, "PGPORT": str(self.port), "PGUSER": self.user, "PGDATABASE": self.database}


@contextmanager
def target(side: Side, bin_directory: Path | None = None) -> Iterator[Target]:
    """A server of its own, so that neither run sees what the other has left. The DB node is on TCP on both legs."""
    port = free_port()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="skv-")))
        home.chmod(0o711)
        options = _SERVER_OPTIONS | {"port": str(port)}
        server = EmbeddedPostgres(PostgresSettings(bin=bin_directory), home / "pg", throw_away=True, options=options)
        cluster = stack.enter_context(server)
        if side is Side.DIRECT:
            yield Target(port)
            return
        with psycopg.connect(cluster.database_url(DATABASE), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {_FUNCTIONS_DATABASE}")
        install(cluster.database_url(_FUNCTIONS_DATABASE), address_in(home))
        front = stack.enter_context(
            front_thread(
                cluster, home, ReversingModel(), backend_url=f"postgresql://127.0.0.1:{port}", clients_max=CLIENTS_MAX
            )
        )
        yield Target(front.settings.port)
