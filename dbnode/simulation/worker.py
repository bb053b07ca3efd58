"""A simulated worker: computes prompts one after another, and holds blocks in an L1 of fixed size.

It takes as long as the curves of a profile say, or fixed times per token. What the pool has of a prompt is loaded layer by layer
while the rest of it is computed, so that the longer of both counts. Decoding slows no prompt. At least one token is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from dbnode.simulation.caches import LruBlocks
from dbnode.simulation.decoding import Decoding
from dbnode.simulation.request import SimRequest
from stratakv.keys import BlockKey
from stratakv.wire import WorkerLoad
from stratakv.worker_profile import Curves


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
    curves: Curves | None = None
    """Say how long computing takes, if there are any; the rates above are then only what the worker tells of itself."""

    def prefill_s(self, num_tokens: int, num_cached: int) -> float:
        """So many tokens of a prompt, behind so many that need not be computed."""
        return self.curves.prefill_s(num_tokens, num_cached) if self.curves else num_tokens / self.prefill_tokens_per_s

    def step_s(self, num_sequences: int, context_tokens: int) -> float:
        """One token for each of so many sequences, which have so many tokens together."""
        if self.curves is None or not num_sequences:
            return self.decode_step_s
        return self.curves.decode_step_s(num_sequences, context_tokens // num_sequences)


@dataclass(slots=True)
class SimWorker:
    """One worker; `begin` and `finish` are called as time passes."""

    model: WorkerModel
    pool: LruBlocks | None
    told: Callable[[list[BlockKey], list[BlockKey]], None]
    """Called with the blocks that L1 got and lost."""
    queue: deque[SimRequest] = field(default_factory=deque)
    l1: LruBlocks = field(init=False)
    decoding: Decoding = field(init=False)
    computing: SimRequest | None = None
    waiting_tokens: int = 0

    def __post_init__(self) -> None:
        self.l1 = LruBlocks(self.model.l1_blocks)
        self.decoding = Decoding(self.model.step_s)

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
        if load_s >= model.prefill_s(pool_blocks * model.block_tokens, l1_blocks * model.block_tokens):
            pool_blocks, load_s = 0, 0.0  # computing it is quicker
        request.l1_tokens, request.pool_tokens = l1_blocks * model.block_tokens, pool_blocks * model.block_tokens
        num_computed = max(1, request.request.prompt_tokens - request.l1_tokens - request.pool_tokens)
        return now_s + max(load_s, model.prefill_s(num_computed, request.request.prompt_tokens - num_computed))

    def finish(self, now_s: float) -> SimRequest:
        """The prompt is computed; the first token is there."""
        request = self.computing
        assert request is not None
        self.computing = None
        request.first_token_s = now_s
        self.waiting_tokens -= request.estimated_tokens
        self.decoding.add(now_s, request)
        self.told(*self.l1.use(request.request.keys))
        if self.pool is not None:
            self.pool.use(request.request.keys)
        return request

    def load(self) -> WorkerLoad:
        """As a worker tells it."""
        model = self.model
        return WorkerLoad(
            running=len(self.decoding) + (self.computing is not None),
            waiting=len(self.queue),
            waiting_tokens=self.waiting_tokens,
            l1_blocks_total=model.l1_blocks,
            l1_blocks_free=max(0, model.l1_blocks - len(self.l1)),
            prefill_tokens_per_s=model.prefill_tokens_per_s,
            decode_step_s=self.decoding.step_s or model.decode_step_s,
            load_bytes_per_s={"pool": model.pool_bytes_per_s} if model.pool_bytes_per_s else {},
        )

    def _load_s(self, num_blocks: int) -> float:
        model = self.model
        if not num_blocks:
            return 0.0
        return num_blocks * model.block_tokens * model.kv_bytes_per_token / model.pool_bytes_per_s
