"""Who leads: takes, renews and gives up the lease on the metadata, which is kept on PostgreSQL's clock.

    standing by ── lease free ──► leading (a new term) ── renewed in time ──► leading
         ▲                           └── another term, demoted ──► standing by
         └───────────────────────────────┘

The lease says who may answer; that nobody else can write is PostgreSQL's doing (`check_meta_term` of the schema refuses every
other term). So a leader that was frozen, or cut off, may believe what it likes. Run by `meta_server.server`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from meta_server.store import CONNECTION_ERRORS, QUERIES
from stratakv.errors import SetupError
from stratakv.log import EventLogger
from stratakv.settings import DatabaseSettings

RENEWALS_PER_LEASE = 4
STANDBY_POLL_S_MAX = 0.5
TAKE_OVER_WAIT_S = 10.0
"""Longest wait for writes of the leader before, which PostgreSQL has begun to carry out."""
CLOCK_MARGIN = 0.95
"""Of the lease, this share is trusted: the clocks of two hosts do not run equally fast."""
_log = EventLogger("meta_server.elector")


@dataclass(frozen=True, slots=True)
class Server:
    """One meta server of the database: where its calls are answered."""

    address: str
    """host:port of the native protocol; its name among the others."""
    kvcm_host: str = ""
    kvcm_grpc_port: int = 0
    kvcm_http_port: int = 0


NOBODY = Server("")


def boottime() -> float:
    """Seconds that go on while the host sleeps: a lease does not."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def place_of(address: str) -> str:
    """Names a listener of this very host: a process that has bound it knows that whoever had it before is gone."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    network = Path("/proc/self/ns/net")
    parts = (boot.read_text().strip(), str(network.stat().st_ino)) if boot.exists() and network.exists() else ()
    return "/".join((*parts, address)) if parts else ""


class Elector:
    """This process's part in the lease."""

    def __init__(
        self,
        url: str,
        settings: DatabaseSettings,
        server: Server,
        lease_s: float,
        clock: Callable[[], float] = boottime,
    ) -> None:
        self.server = server
        self.lease_s = lease_s
        self.campaign_delay_s = lease_s
        """A leader that was demoted lets the others try for so long."""
        self.leader = NOBODY
        """As far as is known; of a lease that has run out it is who had it last."""
        self.standbys: list[str] = []
        """Others that were alive at the last renewal."""
        self.term = 0
        """0 while another one leads, or nobody."""
        self.take_overs = 0
        self.last_loop_s = 0.0
        """Unix time at which PostgreSQL was last asked with success."""
        self._url = url
        self._settings = settings
        self._clock = clock
        self._place = place_of(server.address)
        self._valid_until = 0.0
        self._not_before = 0.0
        self._connection: asyncpg.Connection | None = None
        self._is_cut_off = False
        """The last question to PostgreSQL was not answered."""
        self._lost = asyncio.Event()

    @property
    def is_leader(self) -> bool:
        """Whether the lease is ours, by our own clock."""
        return self.term > 0 and self._clock() < self._valid_until

    @property
    def may_answer(self) -> bool:
        """Also a leader without standbys whose database does not answer: what it says is only looked up, and verified by who
        reads the pages; nothing can be written.
        """
        return self.is_leader or (self.term > 0 and not self.standbys and self._is_cut_off)

    @property
    def lease_left_s(self) -> float:
        return max(0.0, self._valid_until - self._clock()) if self.term else 0.0

    async def open(self) -> None:
        """Connect for the first time. Raises SetupError."""
        try:
            await self._ask(self._look)
        except CONNECTION_ERRORS as error:
            raise SetupError(f"database.url: cannot connect: {error or type(error).__name__}") from error

    async def campaign(self, stands_by: Callable[[], None]) -> int:
        """Stand by until the lease is ours; the new term. A database that is away is tried again.

        `stands_by` is called once, if somebody else leads.
        """
        is_told = False
        while True:
            try:
                left_s = await self._ask(self._try)
            except CONNECTION_ERRORS as error:
                _log.warning("election_delayed", error=type(error).__name__, detail=str(error))
                left_s = STANDBY_POLL_S_MAX
            if self.term:
                self.take_overs += 1
                _log.info("leading", term=self.term, server=self.server.address)
                return self.term
            if not is_told and left_s > 0 and self.leader != self.server:
                is_told = True
                stands_by()
            await asyncio.sleep(max(0.01, min(left_s, STANDBY_POLL_S_MAX, self.lease_s / RENEWALS_PER_LEASE)))

    async def keep(self) -> None:
        """Renew the lease until it is lost, or given up."""
        while not self._lost.is_set():
            try:
                await asyncio.wait_for(self._lost.wait(), self.lease_s / RENEWALS_PER_LEASE)
            except TimeoutError:
                try:
                    await self._ask(self._renew)
                except CONNECTION_ERRORS as error:
                    _log.warning("lease_not_renewed", error=type(error).__name__, left_s=round(self.lease_left_s, 2))
        _log.info("not_leading", term=self.term)
        self.term = 0

    def lose(self) -> None:
        """PostgreSQL has refused a write: another one leads."""
        self._valid_until = 0.0
        self._lost.set()

    async def demote(self) -> None:
        """Let another one lead, if there is any that wants to within `campaign_delay_s`."""
        if self.term:
            self._not_before = self._clock() + self.campaign_delay_s
            await self.give_up()

    async def give_up(self) -> None:
        """End the lease now; does nothing for who does not lead. If PostgreSQL cannot be told, the lease runs out there."""
        self._valid_until = 0.0
        if self.term and not self._lost.is_set():
            try:
                await self._ask(lambda c: c.execute(QUERIES["give_up_lead"], self.term))
            except CONNECTION_ERRORS as error:
                _log.warning("lease_not_given_up", error=type(error).__name__)
        self._lost.set()

    async def close(self) -> None:
        """Leave the list of servers, and disconnect."""
        try:
            await self._ask(lambda c: c.execute(QUERIES["hide_server"], self.server.address))
        except CONNECTION_ERRORS as error:
            _log.debug("server_not_hidden", error=type(error).__name__)
        self._disconnect()

    async def _ask(self, question: Callable[[Any], Any]) -> Any:
        """On a connection of its own: the lease must not wait for any other work. Raises CONNECTION_ERRORS."""
        try:
            if self._connection is None or self._connection.is_closed():
                self._connection = await asyncpg.connect(
                    self._url,
                    timeout=min(self._settings.connect_timeout_s, self.lease_s),
                    command_timeout=self.lease_s,
                    server_settings={"application_name": "stratakv meta lease", "synchronous_commit": "on"},
                )
            answer = await question(self._connection)
        except CONNECTION_ERRORS:
            self._is_cut_off = True
            self._disconnect()
            raise
        self._is_cut_off = False
        self.last_loop_s = time.time()
        return answer

    async def _look(self, connection: Any) -> float:
        """Show ourselves, see who leads; the seconds left of its lease."""
        me = self.server
        await connection.execute(QUERIES["show_server"], me.address, me.kvcm_host, me.kvcm_grpc_port, me.kvcm_http_port)
        row = await connection.fetchrow(QUERIES["leader"])
        self.leader = Server(row["server"], row["kvcm_host"], row["kvcm_grpc_port"], row["kvcm_http_port"])
        return 0.0 if self._place and row["place"] == self._place else float(row["left_s"])

    async def _try(self, connection: Any) -> float:
        left_s = await self._look(connection)
        wait_s = max(left_s, self._not_before - self._clock())
        if wait_s > 0:
            return wait_s
        began = self._clock()
        term = await connection.fetchval(
            QUERIES["take_lead"], self.server.address, self._place, self.lease_s, timeout=TAKE_OVER_WAIT_S
        )
        if term is not None:
            self.standbys = [row[0] for row in await connection.fetch(*self._others())]
            self.leader = self.server
            self._lost.clear()
            self._valid_until = began + self.lease_s * CLOCK_MARGIN
            self.term = int(term)
        return 0.0

    async def _renew(self, connection: Any) -> None:
        began = self._clock()
        if await connection.fetchval(QUERIES["renew_lead"], self.term, self.lease_s) is None:
            self.lose()
            return
        self._valid_until = began + self.lease_s * CLOCK_MARGIN
        await self._look(connection)
        self.standbys = [row[0] for row in await connection.fetch(*self._others())]

    def _others(self) -> tuple[object, ...]:
        return QUERIES["other_servers"], self.server.address, 3 * self.lease_s

    def _disconnect(self) -> None:
        if self._connection is not None and not self._connection.is_closed():
            self._connection.terminate()
        self._connection = None
