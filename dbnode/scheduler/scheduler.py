"""Ties directory, pool and planner together: one `plan` per attempt to serve a request.

Called by `dbnode.dispatch`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence

from dbnode.errors import NoWorker
from dbnode.scheduler.fleet import WorkerRecord
from dbnode.scheduler.overload import Forecast, is_late, may_be_late, too_late
from dbnode.scheduler.planner import Plan, Planner, PromptKeys, Scope, scope
from dbnode.scheduler.pool_view import PoolView
from dbnode.scheduler.workers import WorkerDirectory
from stratakv.settings import RouterSettings

PEEK_TOKENS_MIN = 128
"""The pool is not asked about a prompt of which some worker lacks fewer tokens."""
FETCH_AHEAD_WAIT_S_MIN = 0.5
"""A request that waits for less has nothing fetched ahead."""


class Scheduler(Planner):
    """A planner over the workers that live, which asks the pool what it holds."""

    def __init__(
        self,
        settings: RouterSettings,
        directory: WorkerDirectory,
        pool: PoolView,
        kv_bytes_per_token: int,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(settings, directory, kv_bytes_per_token, rng, clock)
        self.directory = directory
        self._pool = pool

    async def plan(
        self,
        request_id: str,
        model: str,
        keys: PromptKeys,
        max_tokens: int,
        avoid: frozenset[str],
        attempt: int,
        tpot_max_s: float = 0.0,
    ) -> Plan:
        """Choose for one attempt; `avoid` are URLs that failed this request. Raises NoWorker."""
        records = self.able(model, len(keys.token_ids) + max_tokens, avoid)
        if not records:
            raise NoWorker(f"no worker is there for model {model}")
        held = self.held_tokens(records, keys)
        pool_tokens = await self._pool_tokens(records, keys, max(held.values()))
        may_split = attempt == 0 and self._pool.available
        plan = self.choose(
            request_id,
            records,
            keys,
            max_tokens,
            held,
            pool_tokens,
            attempt=attempt,
            may_split=may_split,
            tpot_max_s=tpot_max_s,
        )
        if plan.wait_s >= FETCH_AHEAD_WAIT_S_MIN and max(pool_tokens.values(), default=0) > held[plan.first.url]:
            self.fetch_ahead(model, keys)
        return plan

    def fetch_ahead(self, model: str, keys: PromptKeys) -> None:
        """The request has to wait: have what the pool holds of it brought to memory meanwhile."""
        records = self.directory.usable(model)
        for namespace, size in {scope(r) for r in records if r.facts is not None and r.facts.is_pooled}:
            self._pool.fetch_ahead(bytes.fromhex(namespace), keys.of_size(size))

    async def check_time(self, model: str, keys: PromptKeys, limit_s: float, waiting_tokens: int) -> None:
        """Raises ExpectedTooLate if the load makes the first token come after `limit_s`.

        `waiting_tokens` are prompts that no worker has been sent yet. Costs next to nothing while there is no such load.
        """
        records = self.able(model, len(keys.token_ids))
        wait_s = self.least_wait_s(records)
        if wait_s is None:
            return
        before_s = waiting_tokens / sum(record.load.prefill_tokens_per_s for record in records)
        if not may_be_late(before_s + wait_s, limit_s):
            return
        held = self.held_tokens(records, keys)
        pool_tokens = await self._pool_tokens(records, keys, max(held.values()))
        found = self.forecast(records, keys, held, pool_tokens)
        if found is None:
            return
        forecast = Forecast(before_s + found.wait_s, before_s + found.first_token_s)
        if is_late(forecast, limit_s):
            raise too_late(forecast, limit_s)

    async def cached_tokens(self, model: str, keys: PromptKeys, *, ask_pool: bool) -> int:
        """Leading prompt tokens that a worker or the pool holds now, as far as is known."""
        records = self.directory.usable(model)
        most = max(self.held_tokens(records, keys).values(), default=0)
        pool_tokens = await self._pool_tokens(records, keys, most) if ask_pool else {}
        return max(most, *pool_tokens.values(), 0)

    async def _pool_tokens(
        self, records: Sequence[WorkerRecord], keys: PromptKeys, l1_tokens_most: int
    ) -> dict[Scope, int]:
        """Tokens in the pool, by namespace and block size."""
        if not self._pool.available or len(keys.token_ids) - l1_tokens_most < PEEK_TOKENS_MIN:
            return {}
        scopes = sorted({scope(record) for record in records if record.facts is not None and record.facts.is_pooled})
        counts = await asyncio.gather(
            *(self._pool.count_blocks(bytes.fromhex(namespace), keys.of_size(size)) for namespace, size in scopes)
        )
        return {asked: count * asked[1] for asked, count in zip(scopes, counts, strict=True)}
