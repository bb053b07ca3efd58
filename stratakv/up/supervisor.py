"""Starts all services in order, keeps them alive, and stops them in the reverse order.

The database is there and migrated before this begins. One task per service; the first that cannot be kept alive ends all.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from stratakv.errors import SetupError
from stratakv.postgres import EmbeddedPostgres
from stratakv.postgres.keeping import keep_running
from stratakv.process import first_setup_error
from stratakv.up.child import Child
from stratakv.up.plan import ServiceSpec
from stratakv.up.readiness import Readiness

READY_TIMEOUT_S = 300.0
"""Loading a large model from a slow disk is what takes longest."""
READY_POLL_S = 0.1


class Supervisor:
    """Owns the processes of one `stratakv up`."""

    def __init__(
        self,
        plan: Sequence[ServiceSpec],
        *,
        readiness: Readiness,
        cluster: EmbeddedPostgres | None,
        log_dir: Path,
        on_service_ready: Callable[[ServiceSpec], None],
        on_change: Callable[[Supervisor], None],
    ) -> None:
        self.cluster = cluster
        self.is_ready = False
        self._readiness = readiness
        self._on_service_ready = on_service_ready
        self._on_change = on_change
        self.children = [Child(spec, log_dir / f"{spec.name}.log", self._changed) for spec in plan]

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set. Raises SetupError if a service cannot be started or kept alive."""
        work = asyncio.create_task(self._work(), name="services")
        stopped = asyncio.create_task(stop.wait(), name="stop")
        try:
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except* SetupError as group:
            raise first_setup_error(group) from None
        finally:
            stopped.cancel()
            work.cancel()
            # Its errors were raised above, or do not matter any more.
            await asyncio.gather(work, stopped, return_exceptions=True)
            await self._stop_all()

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            if self.cluster is not None:
                group.create_task(keep_running(self.cluster, self._changed), name="database")
            for children in self._stages():
                for child in children:
                    await child.start()
                    group.create_task(child.run(), name=child.spec.name)
                await asyncio.gather(*(self._until_ready(child) for child in children))
            self.is_ready = True
            self._changed()

    def _stages(self) -> list[list[Child]]:
        """Services that start together: each kind needs those before it."""
        return [list(children) for _, children in itertools.groupby(self.children, key=lambda child: child.spec.kind)]

    async def _until_ready(self, child: Child) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not await self._readiness.is_ready(child.spec):
            if time.monotonic() > deadline:
                raise SetupError(f"{child.spec.name} was not ready after {READY_TIMEOUT_S:.0f} s: {child.log_tail()}")
            await asyncio.sleep(READY_POLL_S)
        self._on_service_ready(child.spec)

    async def _stop_all(self) -> None:
        for children in reversed(self._stages()):
            await asyncio.gather(*(child.stop() for child in children))

    def _changed(self) -> None:
        self._on_change(self)
