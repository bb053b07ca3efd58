"""Plans requests onto a fleet, and counts what was sent: everything of the scheduler that needs neither network nor waiting.

`dbnode.scheduler.scheduler` asks the pool and the workers, then comes here; the simulation comes here directly. Keeps the last
decisions for the operator to look at.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import msgspec

from dbnode.errors import NoWorker
from dbnode.scheduler.cost import PREFILL_TOKENS_PER_S_DEFAULT, Candidate, Work, forecast_s, prefill_cost
from dbnode.scheduler.fleet import MEAN_WEIGHT, Fleet, Sent, WorkerRecord
from dbnode.scheduler.overload import Forecast
from dbnode.scheduler.policies import make_policy
from dbnode.scheduler.policies.base import Stage
from dbnode.scheduler.router import Decision, route
from stratakv.keys import BlockKey, block_keys, salt_extra
from stratakv.log import EventLogger
from stratakv.settings import RouterPolicy, RouterSettings
from stratakv.wire import WorkerRole

log = EventLogger("dbnode.router")

DECISIONS_KEPT = 256

Scope = tuple[str, int]
"""Namespace and block size: workers of one scope find the same blocks in the pool."""


class PromptKeys:
    """A prompt's block keys, computed once per block size."""

    def __init__(
        self,
        token_ids: Sequence[int],
        cache_salt: str | None = None,
        known: Mapping[int, list[BlockKey]] | None = None,
    ) -> None:
        """`known` keys, by block size, are taken as they are."""
        self.token_ids = token_ids
        self.cache_salt = cache_salt
        self._by_size: dict[int, list[BlockKey]] = dict(known or {})

    def of_size(self, block_size: int) -> list[BlockKey]:
        if block_size not in self._by_size:
            self._by_size[block_size] = block_keys(
                self.token_ids, block_size, first_block_extra=salt_extra(self.cache_salt)
            )
        return self._by_size[block_size]


class Plan(msgspec.Struct, frozen=True):
    """Where to send a request: to `worker`, after `prefill` when that is given."""

    worker: WorkerRecord
    prefill: WorkerRecord | None
    uncached_tokens: int
    wait_s: float = 0.0
    """Until the prompt's turn comes, as expected."""

    @property
    def first(self) -> WorkerRecord:
        """Whose turn comes first."""
        return self.prefill or self.worker


class RouteRecord(msgspec.Struct, frozen=True):
    """One decision, as /admin/routes shows it."""

    request_id: str
    at_unix_s: float
    prompt_tokens: int
    uncached_tokens: int
    pool_tokens: int
    worker: str
    prefill: str | None
    policy: RouterPolicy
    unit: str
    """Of the scores."""
    scores: dict[str, float]
    reason: str
    attempt: int


class Planner:
    """Chooses among the workers of a fleet."""

    def __init__(
        self,
        settings: RouterSettings,
        fleet: Fleet,
        kv_bytes_per_token: int,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.fleet = fleet
        self.decisions: deque[RouteRecord] = deque(maxlen=DECISIONS_KEPT)
        self._settings = settings
        self._policy = make_policy(settings.policy)
        self._kv_bytes_per_token = kv_bytes_per_token
        self._rng = rng or random.Random()
        self._clock = clock
        self._wall = wall
        self._turns = 0

    def able(self, model: str, num_tokens: int, avoid: frozenset[str] = frozenset()) -> list[WorkerRecord]:
        """Workers that could take so many tokens; `avoid` are URLs."""
        usable = (r for r in self.fleet.usable(model) if r.url not in avoid)
        return [r for r in usable if r.facts is not None and r.facts.max_model_len >= num_tokens]

    def held_tokens(self, records: Sequence[WorkerRecord], keys: PromptKeys) -> dict[str, int]:
        """Leading prompt tokens that each probably holds in device memory, by URL."""
        return {record.url: _l1_tokens(record, keys) for record in records}

    def choose(
        self,
        request_id: str,
        records: Sequence[WorkerRecord],
        keys: PromptKeys,
        max_tokens: int,
        held: Mapping[str, int],
        pool_tokens: Mapping[Scope, int],
        *,
        attempt: int = 0,
        may_split: bool = True,
        tpot_max_s: float = 0.0,
    ) -> Plan:
        """One of `records`, or two, given how many tokens each holds itself (by URL) and are in the pool. Raises NoWorker."""
        work = Work(len(keys.token_ids), max_tokens, self._kv_bytes_per_token, tpot_max_s)
        by_url = {record.url: record for record in records if record.usable}
        candidates = [self._candidate(record, keys, held, pool_tokens) for record in by_url.values()]
        split_min = self._settings.split_tokens_min
        decision = route(candidates, work, self._policy, split_min, self._rng, may_split=may_split)
        if decision is None:
            raise NoWorker("no worker is there for this request")
        self._record(request_id, work, decision, attempt)
        prefill = by_url[decision.prefill.url] if decision.prefill else None
        first = decision.prefill or decision.worker
        rate = first.prefill_tokens_per_s or PREFILL_TOKENS_PER_S_DEFAULT
        return Plan(by_url[decision.worker.url], prefill, decision.uncached_tokens, first.queued_tokens / rate)

    def least_wait_s(self, records: Sequence[WorkerRecord]) -> float | None:
        """The shortest queue; None without workers, or while rates are not measured."""
        now_s = self._clock()
        least_s: float | None = None
        for record in records:
            if record.usable:
                rate = record.load.prefill_tokens_per_s
                if not rate:
                    return None
                wait_s = record.queued_tokens(now_s) / rate
                least_s = wait_s if least_s is None else min(least_s, wait_s)
        return least_s

    def forecast(
        self,
        records: Sequence[WorkerRecord],
        keys: PromptKeys,
        held: Mapping[str, int],
        pool_tokens: Mapping[Scope, int],
    ) -> Forecast | None:
        """Of a prompt sent now, on the worker that is quickest with it; None as in `least_wait_s`."""
        work = Work(len(keys.token_ids), 1, self._kv_bytes_per_token)
        candidates = [self._candidate(record, keys, held, pool_tokens) for record in records if record.usable]
        if not candidates or not all(candidate.prefill_tokens_per_s for candidate in candidates):
            return None
        costs = [prefill_cost(candidate, work, frozenset(WorkerRole)) for candidate in candidates]
        wait_ms, work_ms = min(((cost.queue_ms, cost.load_ms + cost.prefill_ms) for cost in costs), key=sum)
        return Forecast(wait_ms / 1000, (wait_ms + work_ms) / 1000)

    def forecast_s(self, model: str, computed_tokens: int, decode_steps: int, num_at_once: int) -> float | None:
        """How long so much work would take on all workers; None without any."""
        candidates = [record.candidate(0, 0) for record in self.fleet.usable(model)]
        return forecast_s(candidates, computed_tokens, decode_steps, num_at_once) if candidates else None

    @contextmanager
    def sent(self, record: WorkerRecord, keys: PromptKeys, num_tokens: int) -> Iterator[Sent]:
        """Count a request against a worker, from before it is sent until it ends."""
        sent = self.send(record, keys, num_tokens)
        try:
            yield sent
        finally:
            self.ended(record, sent)

    def send(self, record: WorkerRecord, keys: PromptKeys, num_tokens: int) -> Sent:
        """A worker is about to get a request of which it has to compute so many tokens."""
        assert record.facts is not None
        sent = Sent(self._clock(), num_tokens, len(keys.token_ids), keys=keys.of_size(record.facts.block_size))
        record.send(sent)
        record.index.add(sent.keys, self._settings.request_timeout_s)
        self._turns += 1
        record.last_turn = self._turns
        record.sent_tokens_mean += (num_tokens - record.sent_tokens_mean) * MEAN_WEIGHT
        return sent

    def prefilled(self, record: WorkerRecord, sent: Sent) -> None:
        """The request's prompt is computed."""
        if sent.prefilled:
            return
        record.prefilled(sent, self._clock())
        if record.index.is_told:
            record.index.add(sent.keys)  # from now on the worker must tell of them soon

    def ended(self, record: WorkerRecord, sent: Sent) -> None:
        """The worker has the request in hand no longer."""
        self.prefilled(record, sent)
        record.ended(sent)

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

    def _candidate(
        self, record: WorkerRecord, keys: PromptKeys, held: Mapping[str, int], pool_tokens: Mapping[Scope, int]
    ) -> Candidate:
        below = max(_below_tokens(record, keys), pool_tokens.get(scope(record), 0))
        return record.candidate(held[record.url], below, self._clock())

    def _record(self, request_id: str, work: Work, decision: Decision, attempt: int) -> None:
        stage = Stage.WHOLE if decision.prefill is None else Stage.DECODE
        reason = self._policy.reason(decision.worker, work, stage)
        if decision.prefill is not None:
            reason = f"{reason}; prefill: {self._policy.reason(decision.prefill, work, Stage.PREFILL)}"
        route_record = RouteRecord(
            request_id=request_id,
            at_unix_s=self._wall(),
            prompt_tokens=work.prompt_tokens,
            uncached_tokens=decision.uncached_tokens,
            pool_tokens=decision.worker.pool_tokens,
            worker=decision.worker.worker,
            prefill=decision.prefill.worker if decision.prefill else None,
            policy=self._policy.name,
            unit=self._policy.unit,
            scores=decision.scores,
            reason=reason,
            attempt=attempt,
        )
        self.decisions.append(route_record)
        log.debug(
            "routed",
            request=request_id,
            worker=route_record.worker,
            prefill=route_record.prefill,
            scores=route_record.scores,
            reason=reason,
        )


def scope(record: WorkerRecord) -> Scope:
    assert record.facts is not None
    return record.facts.namespace, record.facts.block_size


def _l1_tokens(record: WorkerRecord, keys: PromptKeys) -> int:
    assert record.facts is not None
    size = record.facts.block_size
    return record.index.match(keys.of_size(size)) * size


def _below_tokens(record: WorkerRecord, keys: PromptKeys) -> int:
    """Prompt tokens that it tells it need not compute, those included that it has to load."""
    assert record.facts is not None
    if not record.index.is_told or not record.index.holds_below:
        return 0
    size = record.facts.block_size
    return record.index.match_below(keys.of_size(size)) * size
