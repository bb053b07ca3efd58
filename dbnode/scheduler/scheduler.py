"""Ties directory, index, pool and router together: one `plan` per attempt to serve a request.

Called by `dbnode.dispatch`; keeps the last decisions for the operator to look at.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from dbnode.errors import NoWorker
from dbnode.scheduler.cost import Work, forecast_s
from dbnode.scheduler.pool_view import PoolView
from dbnode.scheduler.router import Decision, route
from dbnode.scheduler.workers import Sent, WorkerDirectory, WorkerRecord
from stratakv.keys import BlockKey, block_keys, salt_extra
from stratakv.settings import RouterSettings

DECISIONS_KEPT = 256
PEEK_TOKENS_MIN = 128
"""The pool is not asked about a prompt of which some worker lacks fewer tokens."""


class PromptKeys:
    """A prompt's block keys, computed once per block size."""

    def __init__(self, token_ids: Sequence[int], cache_salt: str | None = None) -> None:
        self.token_ids = token_ids
        self.cache_salt = cache_salt
        self._by_size: dict[int, list[BlockKey]] = {}

    def of_size(self, block_size: int) -> list[BlockKey]:
        if block_size not in self._by_size:
            self._by_size[block_size] = block_keys(
                self.token_ids, block_size, first_block_extra=salt_extra(self.cache_salt)
            )
        return self._by_size[block_size]


@dataclass(frozen=True, slots=True)
class Plan:
    """Where to send a request: to `worker`, after `prefill` when that is given."""

    worker: WorkerRecord
    prefill: WorkerRecord | None
    uncached_tokens: int


@dataclass(frozen=True, slots=True)
class RouteRecord:
    """One decision, as /admin/routes shows it."""

    request_id: str
    at_unix_s: float
    prompt_tokens: int
    uncached_tokens: int
    pool_tokens: int
    worker: str
    prefill: str | None
    scores_ms: dict[str, float]
    attempt: int


class Scheduler:
    """Plans requests onto workers."""

    def __init__(
        self,
        settings: RouterSettings,
        directory: WorkerDirectory,
        pool: PoolView,
        kv_bytes_per_token: int,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = directory
        self.decisions: deque[RouteRecord] = deque(maxlen=DECISIONS_KEPT)
        self._settings = settings
        self._pool = pool
        self._kv_bytes_per_token = kv_bytes_per_token
        self._rng = rng or random.Random()
        self._clock = clock

    async def plan(
        self, request_id: str, model: str, keys: PromptKeys, max_tokens: int, avoid: frozenset[str], attempt: int
    ) -> Plan:
        """Choose for one attempt; `avoid` are URLs that failed this request. Raises NoWorker."""
        records = {r.url: r for r in self.directory.usable(model) if r.url not in avoid}
        needed = len(keys.token_ids) + max_tokens
        records = {url: r for url, r in records.items() if r.facts is not None and r.facts.max_model_len >= needed}
        l1_tokens = {url: _l1_tokens(record, keys) for url, record in records.items()}
        pool_tokens = await self._pool_tokens(list(records.values()), keys, max(l1_tokens.values(), default=0))
        work = Work(len(keys.token_ids), max_tokens, self._kv_bytes_per_token)
        decision = route(
            [
                r.candidate(l1_tokens[url], max(_below_tokens(r, keys), pool_tokens.get(_scope(r), 0)))
                for url, r in records.items()
                if r.usable
            ],
            work,
            self._settings.split_tokens_min,
            self._rng,
            may_split=attempt == 0 and self._pool.available,
        )
        if decision is None:
            raise NoWorker(f"no worker is there for model {model}")
        self._record(request_id, work, decision, attempt)
        prefill = records[decision.prefill.url] if decision.prefill else None
        return Plan(records[decision.worker.url], prefill, decision.uncached_tokens)

    async def cached_tokens(self, model: str, keys: PromptKeys, *, ask_pool: bool) -> int:
        """Leading prompt tokens that a worker or the pool holds now, as far as is known."""
        records = self.directory.usable(model)
        l1_tokens = max((_l1_tokens(record, keys) for record in records), default=0)
        pool_tokens = await self._pool_tokens(records, keys, l1_tokens) if ask_pool else {}
        return max(l1_tokens, *pool_tokens.values(), 0)

    def forecast_s(self, model: str, computed_tokens: int, decode_steps: int, num_at_once: int) -> float | None:
        """How long so much work would take on all workers; None without any."""
        candidates = [record.candidate(0, 0) for record in self.directory.usable(model)]
        return forecast_s(candidates, computed_tokens, decode_steps, num_at_once) if candidates else None

    @contextmanager
    def sent(self, record: WorkerRecord, keys: PromptKeys, num_tokens: int) -> Iterator[Sent]:
        """Count a request against a worker, from before it is sent until it ends."""
        assert record.facts is not None
        sent = Sent(self._clock(), num_tokens)
        record.sent.append(sent)
        sent.keys = keys.of_size(record.facts.block_size)
        record.index.add(sent.keys, self._settings.request_timeout_s)
        try:
            yield sent
        finally:
            self.prefilled(record, sent)
            record.sent.remove(sent)
            if sent.at_s <= record.load_at_s:
                record.ended += 1

    def prefilled(self, record: WorkerRecord, sent: Sent) -> None:
        """The request's prompt is computed."""
        if not sent.prefilled:
            sent.prefilled = True
            if record.index.is_told:
                record.index.add(sent.keys)  # from now on the worker must tell of them soon
            if sent.at_s <= record.load_at_s:
                record.prefilled_tokens += sent.num_tokens

    def answered(self, record: WorkerRecord, keys: PromptKeys, output_token_ids: Sequence[int]) -> None:
        """The worker now holds prompt and answer, which the next turn of a conversation begins with."""
        assert record.facts is not None
        size = record.facts.block_size
        prompt_keys = keys.of_size(size)
        rest = [*keys.token_ids[len(prompt_keys) * size :], *output_token_ids[:-1]]
        if prompt_keys:
            more = block_keys(rest, size, parent=prompt_keys[-1])
        else:
            more = block_keys(rest, size, first_block_extra=salt_extra(keys.cache_salt))
        record.index.add([*prompt_keys, *more])

    async def _pool_tokens(
        self, records: Sequence[WorkerRecord], keys: PromptKeys, l1_tokens_most: int
    ) -> dict[tuple[str, int], int]:
        """Tokens in the pool, by namespace and block size."""
        if not self._pool.available or len(keys.token_ids) - l1_tokens_most < PEEK_TOKENS_MIN:
            return {}
        scopes = sorted({_scope(record) for record in records if record.facts is not None and record.facts.is_pooled})
        counts = await asyncio.gather(
            *(self._pool.count_blocks(bytes.fromhex(namespace), keys.of_size(size)) for namespace, size in scopes)
        )
        return {scope: count * scope[1] for scope, count in zip(scopes, counts, strict=True)}

    def _record(self, request_id: str, work: Work, decision: Decision, attempt: int) -> None:
        self.decisions.append(
            RouteRecord(
                request_id=request_id,
                at_unix_s=time.time(),
                prompt_tokens=work.prompt_tokens,
                uncached_tokens=decision.uncached_tokens,
                pool_tokens=decision.worker.pool_tokens,
                worker=decision.worker.worker,
                prefill=decision.prefill.worker if decision.prefill else None,
                scores_ms=decision.scores_ms,
                attempt=attempt,
            )
        )


def _scope(record: WorkerRecord) -> tuple[str, int]:
    assert record.facts is not None
    return record.facts.namespace, record.facts.block_size


def _l1_tokens(record: WorkerRecord, keys: PromptKeys) -> int:
    assert record.facts is not None
    size = record.facts.block_size
    return record.index.match(keys.of_size(size)) * size


def _below_tokens(record: WorkerRecord, keys: PromptKeys) -> int:
    """Prompt tokens that it tells it need not compute, those included that it has to load."""
    assert record.facts is not None
    if not record.index.is_told:
        return 0
    size = record.facts.block_size
    return record.index.match_below(keys.of_size(size)) * size
