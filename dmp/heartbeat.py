"""The daemon's talk with the meta server: register, report, carry out orders.

Without a meta server the daemon keeps serving the bytes it has, and keeps trying.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

from dmp.puts import PutTable
from stratakv.errors import SetupError, StrataError
from stratakv.log import EventLogger
from stratakv.pool.meta_client import MetaClient
from stratakv.pool.meta_errors import StaleEpoch
from stratakv.wire import HeartbeatNode, Move, NodeOrders, Registered, RegisterNode, Segment

log = EventLogger("dmp.heartbeat")

RETRY_S_MIN = 0.2
RETRY_S_MAX = 2.0
GRACE_STEP_S = 0.25
"""How often extents whose grace is over are looked for."""


class Heartbeat:
    """Keeps one segment known to the meta server."""

    def __init__(
        self,
        client: MetaClient,
        segment: Segment,
        puts: PutTable,
        random_source: random.Random,
        on_moves_away: Callable[[Sequence[Move]], None],
        on_moves: Callable[[Sequence[Move]], None] | None = None,
    ) -> None:
        """`on_moves` takes pages that shall go to the disk, `on_moves_away` those for other daemons."""
        self._client = client
        self._segment = segment
        self._puts = puts
        self._random = random_source
        self._on_moves = on_moves
        self._on_moves_away = on_moves_away
        self._retry_s = RETRY_S_MIN

    async def run(self) -> None:
        """Register and report until cancelled. Raises SetupError, in a group, when another daemon has taken the node's name."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._free_due())
            tasks.create_task(self._report())

    async def _free_due(self) -> None:
        while True:
            self._puts.free_due()
            await asyncio.sleep(GRACE_STEP_S)

    async def _report(self) -> None:
        while True:
            try:
                registered = await self._client.call(RegisterNode(self._segment), Registered)
                log.info("registered", node=self._segment.node, heartbeat_s=registered.heartbeat_s)
                self._retry_s = RETRY_S_MIN
                await self._beat(registered.heartbeat_s)
            except StaleEpoch:
                # Everything in this memory is void for good.
                raise SetupError(
                    f"dmp.node = {self._segment.node}: another daemon has registered under this name since,"
                    " or this one was silent for meta.node_silence_s_max",
                    hint="give every daemon of the pool a name of its own; one that was silent may be started again",
                ) from None
            except StrataError as error:
                log.warning("meta_server_unreachable", reason=error.message, retry_s=round(self._retry_s, 2))
                await asyncio.sleep(self._retry_s * self._random.uniform(0.5, 1.0))
                self._retry_s = min(RETRY_S_MAX, self._retry_s * 2)

    async def _beat(self, heartbeat_s: float) -> None:
        """Report until the meta server does not know this epoch. Raises StrataError when it does not answer."""
        while True:
            if not await self._beat_once():
                break
            await asyncio.sleep(heartbeat_s)
        log.info("unknown_to_meta_server", node=self._segment.node)

    async def _beat_once(self) -> bool:
        freed = self._puts.freed()
        report = HeartbeatNode(
            node=self._segment.node,
            epoch=self._segment.epoch,
            used_bytes=self._puts.used_bytes,
            free_bytes=self._segment.size_bytes - self._puts.used_bytes,
            undecided_puts=self._puts.undecided(),
            freed=freed,
            limit_bytes=self._puts.limit_bytes,
        )
        orders = await self._client.call(report, NodeOrders)
        if not orders.known:
            return False
        self._puts.confirm_freed(freed)
        self._puts.commit(orders.committed_puts)
        self._puts.void(orders.void_puts)
        self._puts.order_free(orders.free)
        self._puts.limit_bytes = orders.limit_bytes
        if self._on_moves is not None:
            self._on_moves(orders.moves)
        self._on_moves_away(orders.moves_away)
        return True
