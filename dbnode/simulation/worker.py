"""A simulated worker: computes prompts one after another at a fixed rate, and holds blocks in an L1 of fixed size.

What the pool has of a prompt is loaded layer by layer while the rest of it is computed, so that the longer of both counts. Decoding
takes a fixed time per token and slows nothing. At least one token of each prompt is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from dbnode.scheduler.fleet import Sent
from dbnode.simulation.caches import LruBlocks
from dbnode.simulation.trace import TraceRequest
from stratakv.keys import BlockKey
from stratakv.wire import WorkerLoad


@dataclass(frozen=True, slots=True)
class WorkerModel:
    """What all workers of a fleet can do."""

    block_tokens: int
    prefill_tokens_per_s: float
    l1_blocks: int
    decode_step_s: float
    kv_bytes_per_token: int
    pool_bytes_per_s: float
    """0: there is no pool."""


@dataclass(slots=True)
class SimRequest:
    """One request on its way."""

    number: int
    """In the trace."""
    request: TraceRequest
    sent: Sent
    l1_tokens: int = 0
    pool_tokens: int = 0
    estimated_tokens: int = 0
    """What it was thought to have to compute when it arrived at the worker."""
    first_token_s: float = 0.0


@dataclass(slots=True)
class SimWorker:
    """One worker; `begin` and `finish` are called as time passes."""

    model: WorkerModel
    pool: LruBlocks | None
    told: Callable[[list[BlockKey], list[BlockKey]], None]
    """Called with the blocks that L1 got and lost."""
    queue: deque[SimRequest] = field(default_factory=deque)
    l1: LruBlocks = field(init=False)
    computing: SimRequest | None = None
    decoding: int = 0
    waiting_tokens: int = 0

    def __post_init__(self) -> None:
        self.l1 = LruBlocks(self.model.l1_blocks)

    def arrive(self, request: SimRequest) -> None:
        keys = request.request.keys
        cached = max(self.l1.match(keys), self.pool.match(keys) if self.pool is not None else 0)
        request.estimated_tokens = max(1, request.request.prompt_tokens - cached * self.model.block_tokens)
        self.waiting_tokens += request.estimated_tokens
        self.queue.append(request)

    def begin(self, now_s: float) -> float | None:
        """Start on the next prompt, if there is one and nothing is being computed; when it will be done."""
        if self.computing is not None or not self.queue:
            return None
        request = self.computing = self.queue.popleft()
        model, keys = self.model, request.request.keys
        l1_blocks = self.l1.match(keys)
        pool_blocks = max(0, self.pool.match(keys) - l1_blocks) if self.pool is not None else 0
        load_s = self._load_s(pool_blocks)
        if load_s >= pool_blocks * model.block_tokens / model.prefill_tokens_per_s:
            pool_blocks, load_s = 0, 0.0  # computing it is quicker
        request.l1_tokens, request.pool_tokens = l1_blocks * model.block_tokens, pool_blocks * model.block_tokens
        num_computed = max(1, request.request.prompt_tokens - request.l1_tokens - request.pool_tokens)
        return now_s + max(load_s, num_computed / model.prefill_tokens_per_s)

    def finish(self, now_s: float) -> SimRequest:
        """The prompt is computed; the first token is there."""
        request = self.computing
        assert request is not None
        self.computing = None
        request.first_token_s = now_s
        self.waiting_tokens -= request.estimated_tokens
        self.decoding += 1
        self.told(*self.l1.use(request.request.keys))
        if self.pool is not None:
            self.pool.use(request.request.keys)
        return request

    def load(self) -> WorkerLoad:
        """As a worker tells it."""
        model = self.model
        return WorkerLoad(
            running=self.decoding + (self.computing is not None),
            waiting=len(self.queue),
            waiting_tokens=self.waiting_tokens,
            l1_blocks_total=model.l1_blocks,
            l1_blocks_free=max(0, model.l1_blocks - len(self.l1)),
            prefill_tokens_per_s=model.prefill_tokens_per_s,
            decode_step_s=model.decode_step_s,
            load_bytes_per_s={"pool": model.pool_bytes_per_s} if model.pool_bytes_per_s else {},
        )

    def _load_s(self, num_blocks: int) -> float:
        model = self.model
        if not num_blocks:
            return 0.0
        return num_blocks * model.block_tokens * model.kv_bytes_per_token / model.pool_bytes_per_s
