"""The meta server's PostgreSQL: the one that is configured, or one of its own that runs while the meta server does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from stratakv import migrate
from stratakv.errors import SetupError
from stratakv.log import EventLogger
from stratakv.postgres import EmbeddedPostgres
from stratakv.postgres.keeping import keep_running
from stratakv.settings import Settings

_log = EventLogger("meta_server")


@dataclass(frozen=True, slots=True)
class Database:
    """Where it is, and who keeps it alive."""

    url: str
    cluster: EmbeddedPostgres | None = None
    """None: it is somebody else's."""

    async def keep(self) -> None:
        """Start it again when it dies, until this is cancelled. Raises SetupError."""
        if self.cluster is not None:
            await keep_running(self.cluster)


@contextmanager
def database_of(settings: Settings) -> Iterator[Database]:
    """Running until the end; one of our own also has the newest schema. Raises SetupError."""
    url, directory = settings.database.url, settings.meta.embedded_postgres
    if directory is None:
        if not url:
            raise SetupError(
                "database.url is not set",
                hint="set STRATAKV_DATABASE_URL to the PostgreSQL of the metadata, or --embedded-postgres to a directory",
            )
        yield Database(url)
        return
    if url:
        raise SetupError("database.url and meta.embedded_postgres are both set", hint="unset one of them")
    # On this thread, which is the one that lives as long as the process.
    with EmbeddedPostgres(settings.postgres, directory) as cluster:
        migrate.upgrade(cluster.url)
        _log.info("embedded_postgres", url=cluster.url)
        yield Database(cluster.url, cluster)
