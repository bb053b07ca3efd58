"""The DB node's SQL face: relay and private listener together. Run by the DB node's process."""

from __future__ import annotations

import asyncio
import os
import pwd

from dbnode.sql.admin.login import login_database
from dbnode.sql.backend import BackendAddress
from dbnode.sql.binding import BindingRegistry
from dbnode.sql.explain import Explainer
from dbnode.sql.hints import HintStats
from dbnode.sql.listener import Listener, ListenerLimits
from dbnode.sql.memo import MemoLimits
from dbnode.sql.relay import Relay
from dbnode.sql.service import InferenceService
from dbnode.sql.statement_meter import StatementBook, StatementLog
from dbnode.sql.topics import Topics
from stratakv.log import EventLogger
from stratakv.process import require_loopback
from stratakv.settings import SqlSettings
from stratakv.sqlfunctions import ListenerAddress

log = EventLogger(__name__)

POSTGRES_ACCOUNT = "postgres"


class SqlFront:
    """PostgreSQL clients on one side, infer()'s callbacks on the other.

    `trusted_backend` says that PostgreSQL lets everybody in who reaches it (the embedded cluster); `postgres_uid` is whom
    the kernel must name at the private Unix socket, by default the account `postgres`, or ourselves where there is none.
    """

    def __init__(
        self,
        settings: SqlSettings,
        backend_url: str,
        service: InferenceService,
        *,
        trusted_backend: bool = False,
        postgres_uid: int | None = None,
        statements: StatementLog | None = None,
        explainer: Explainer | None = None,
        topics: Topics | None = None,
    ) -> None:
        """Raises SetupError."""
        if trusted_backend:
            require_loopback(settings.host, "sql.host", "the embedded PostgreSQL asks nobody for a password")
        self._settings = settings
        registry = BindingRegistry()
        memo = MemoLimits(settings.memo_entries_max, settings.memo_bytes_max, settings.memo_ttl_s)
        limits = ListenerLimits(settings.prompt_bytes_max, settings.calls_waiting_max, settings.calls_waiting_max, memo)
        self.address = ListenerAddress.from_settings(settings)
        """What `stratakv.sqlfunctions.install` takes."""
        uid = _postgres_uid() if postgres_uid is None else postgres_uid
        self.book = StatementBook(statements)
        self.listener = Listener(
            self.address,
            limits,
            service,
            registry,
            self.book,
            explainer,
            topics or {},
            postgres_uid=uid,
        )
        self.relay = Relay(
            settings,
            BackendAddress.from_url(backend_url),
            registry,
            self.address.name,
            trusted_backend=trusted_backend,
            is_calling=self.listener.is_calling,
            make_hints=self.listener.make_hints,
            book=self.book,
            login_database=login_database(backend_url),
        )

    @property
    def hint_stats(self) -> HintStats:
        """Counters of looking ahead."""
        return self.listener.hint_stats

    @property
    def port(self) -> int:
        """The relay's port, also when 0 was asked for."""
        return self.relay.port

    async def start(self) -> None:
        """Raises SetupError; nothing is left open then."""
        await self.listener.start()
        try:
            await self.relay.start()
        except BaseException:
            await self.listener.close()
            raise
        log.info("sql_started", host=self._settings.host, port=self.port)

    def reload(self) -> None:
        """Read the files again that may change while we run: certificate, key, verifiers."""
        self.relay.reload()

    async def drain(self) -> None:
        """Take no new clients; what runs gets the grace of the settings, also statements of direct sessions. Then `close`.

        The relay first: its statements may call infer() for more rows.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.drain_grace_s
        await self.relay.drain(self._settings.drain_grace_s)
        await self.listener.drain(max(0.0, deadline - loop.time()))

    async def close(self) -> None:
        """End everything now. Safe to repeat."""
        await self.relay.close()
        await self.listener.close()


def _postgres_uid() -> int:
    try:
        return pwd.getpwnam(POSTGRES_ACCOUNT).pw_uid
    except KeyError:
        return os.geteuid()
