"""The queue in front of the workers: bounded, by priority and arrival within a face, in turn between the faces.

Requests wait here rather than in a worker's queue, so that they are routed with what is known when their turn comes. Owned
by `dbnode.inference`.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from itertools import count

from dbnode.generate import Source
from dbnode.scheduler.overload import retry_after_s, retry_hint
from stratakv.errors import DeadlineExceeded, Overloaded


@dataclass(order=True, slots=True)
class _Waiter:
    """A request in the queue; the least is let in first."""

    priority: int
    number: int
    future: asyncio.Future[None] = field(compare=False)


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
        self._waiting: dict[Source, list[_Waiter]] = {source: [] for source in Source}
        """Heaps."""
        self._numbers = count()
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
        self, source: Source, deadline_s: float, priority: int = 0, num_tokens: int = 0
    ) -> AsyncIterator[None]:
        """Hold a slot; lower priorities get theirs first.

        Raises Overloaded when too many wait already, DeadlineExceeded when its turn comes too late.
        """
        self.waiting_tokens += num_tokens
        try:
            await self._acquire(source, deadline_s, priority)
        finally:
            self.waiting_tokens -= num_tokens
        try:
            yield
        finally:
            self.running -= 1
            self.wake()

    def wake(self) -> None:
        """Let in as many as there are slots; to be called when workers come."""
        while self.running < self._running_max() and (waiter := self._next()) is not None:
            self.running += 1
            waiter.future.set_result(None)

    async def _acquire(self, source: Source, deadline_s: float, priority: int) -> None:
        if not self.is_full:
            self.running += 1
            return
        queue = self._waiting[source]
        if len(queue) >= self._waiting_max[source]:
            retry_s = retry_after_s(self._forecast_s() or 0.0)
            raise Overloaded(
                f"{len(queue)} requests are waiting already", hint=retry_hint(retry_s), retry_after_s=retry_s
            )
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(priority, next(self._numbers), future)
        heapq.heappush(queue, waiter)
        try:
            async with asyncio.timeout_at(deadline_s):
                await future
        except BaseException as error:
            if future.done() and not future.cancelled():
                self.running -= 1  # it was let in just when it gave up
                self.wake()
            else:
                with contextlib.suppress(ValueError):  # already passed over, because it was cancelled
                    queue.remove(waiter)
                    heapq.heapify(queue)
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("the request's deadline passed while it waited for a worker") from None
            raise

    def _next(self) -> _Waiter | None:
        for index, source in enumerate(self._turn):
            queue = self._waiting[source]
            while queue:
                waiter = heapq.heappop(queue)
                if not waiter.future.done():
                    self._turn.append(self._turn.pop(index))
                    return waiter
        return None
