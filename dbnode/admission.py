"""The queue in front of the workers: bounded; the faces take turns, the tenants of a face too, by weight and tokens.

Priority and arrival decide within a tenant only. When the queue is full, who has least in it for its weight still finds room.

Requests wait here rather than in a worker's queue, so that they are routed with what is known when their turn comes. Owned
by `dbnode.inference`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from dbnode.generate import Source
from dbnode.scheduler.overload import retry_after_s, retry_hint
from dbnode.tenants.fair_queue import FairQueue
from stratakv.errors import DeadlineExceeded, Overloaded
from stratakv.tenancy.values import DEFAULT_TENANT, Tenant

Waiter = asyncio.Future[None]
"""A request in the queue."""


class Admission:
    """Slots for requests that workers have in hand, and the queue of those that wait for one."""

    def __init__(
        self,
        running_max: Callable[[], int],
        waiting_max: dict[Source, int],
        forecast_s: Callable[[], float | None] = lambda: None,
    ) -> None:
        """`forecast_s`: how long the shortest queue of a worker is, if that is known."""
        self._forecast_s = forecast_s
        self._running_max = running_max
        self._waiting_max = waiting_max
        self._waiting: dict[Source, FairQueue[Waiter]] = {source: FairQueue() for source in Source}
        self._turn = list(Source)
        self.running = 0
        self.waiting_tokens = 0
        """Prompt tokens of those that wait."""

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return sum(len(queue) for queue in self._waiting.values())

    @property
    def is_full(self) -> bool:
        """Whether who comes now has to wait."""
        return bool(self.waiting) or self.running >= self._running_max()

    @contextlib.asynccontextmanager
    async def slot(
        self,
        source: Source,
        deadline_s: float,
        priority: int = 0,
        *,
        tenant: Tenant = DEFAULT_TENANT,
        cost_tokens: int = 1,
        prompt_tokens: int = 0,
    ) -> AsyncIterator[Callable[[int], None]]:
        """Hold a slot; lower priorities of a tenant get theirs first. To be told how many tokens it took in the end.

        Raises Overloaded when too many wait already, DeadlineExceeded when its turn comes too late.
        """
        self.waiting_tokens += prompt_tokens
        try:
            await self._acquire(source, deadline_s, priority, tenant, cost_tokens)
        finally:
            self.waiting_tokens -= prompt_tokens
        queue = self._waiting[source]
        try:
            yield lambda taken_tokens: queue.correct(tenant.id, cost_tokens - taken_tokens)
        finally:
            self.running -= 1
            self.wake()

    def wake(self) -> None:
        """Let in as many as there are slots; to be called when workers come."""
        while self.running < self._running_max() and (waiter := self._next()) is not None:
            self.running += 1
            waiter.set_result(None)

    def make_room(self, source: Source, tenant: Tenant) -> bool:
        """Refuse one that waits for the sake of a tenant that has less waiting for its weight; False if there is none."""
        while (last := self._waiting[source].make_room(tenant.id, tenant.weight)) is not None:
            if not last.done():
                last.set_exception(self._overloaded("others have less waiting, and there is no room for all"))
                return True
        return False

    async def _acquire(
        self, source: Source, deadline_s: float, priority: int, tenant: Tenant, cost_tokens: int
    ) -> None:
        queue = self._waiting[source]
        if not self.is_full:
            self.running += 1
            queue.pass_by(tenant.id, tenant.weight, cost_tokens)
            return
        if len(queue) >= self._waiting_max[source] and not self.make_room(source, tenant):
            raise self._overloaded(f"{len(queue)} requests are waiting already")
        future: Waiter = asyncio.get_running_loop().create_future()
        entry = queue.push(tenant.id, tenant.weight, cost_tokens, priority, future)
        try:
            async with asyncio.timeout_at(deadline_s):
                await future
        except BaseException as error:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.running -= 1  # it was let in just when it gave up
                self.wake()
            elif entry.is_waiting:
                queue.remove(entry)
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("the request's deadline passed while it waited for a worker") from None
            raise

    def _next(self) -> Waiter | None:
        for index, source in enumerate(self._turn):
            queue = self._waiting[source]
            while (waiter := queue.pop()) is not None:
                if not waiter.done():
                    self._turn.append(self._turn.pop(index))
                    return waiter
        return None

    def _overloaded(self, message: str) -> Overloaded:
        retry_s = retry_after_s(self._forecast_s() or 0.0)
        return Overloaded(message, hint=retry_hint(retry_s), retry_after_s=retry_s)
