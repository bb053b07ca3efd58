"""The part of the connector that runs in vLLM's scheduler: it decides what is loaded and saved, and moves nothing.

Called from the scheduler's thread only. Every request that vLLM admits is known here from its first lookup until it is finished;
what it holds in the pool (leases) and of vLLM (blocks of saves under way) is given back then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stratakv.errors import StrataError
from stratakv.integrations.link import PoolLink
from stratakv.integrations.vllm.lookups import Answer, Lookup, Lookups, release
from stratakv.integrations.vllm.options import LoadMode, Options
from stratakv.integrations.vllm.orders import LoadOrder, Rank, RankSpec, SaveOrder, StepOrders, StepReport
from stratakv.integrations.vllm.rates import Distance, Rates
from stratakv.keys import BlockKey
from stratakv.log import EventLogger
from stratakv.wire import Flush, Flushed

log = EventLogger("stratakv.vllm.scheduler")

FLUSH_S_MAX = 5.0
INTRODUCTION = "stratakv"
"""A request with this key in its `kv_transfer_params` is answered with what blocks these are: a router asks so."""


class EngineRequest(Protocol):
    """What is read of vLLM's requests."""

    request_id: str
    num_tokens: int
    num_computed_tokens: int
    num_preemptions: int


class KeysOfRequests(Protocol):
    """`RequestKeys`."""

    def of(self, request: EngineRequest) -> Sequence[BlockKey]:
        """Keys of the full blocks of all tokens that are known of the request."""

    def forget(self, request_id: str) -> None:
        """The request is finished."""


@dataclass(slots=True)
class _Tracked:
    """One request, as far as the pool is concerned."""

    request: EngineRequest
    blocks: list[int] = field(default_factory=list)
    lookup: Lookup | None = None
    local_blocks: int = 0
    """vLLM's own hit when it asked last."""
    load_blocks: Sequence[int] = ()
    """The blocks of the last load."""
    is_loading: bool = False
    """Between steps."""
    gave_up: bool = False
    """A load failed: the rest is computed, whatever the pool says."""
    num_saved: int = 0
    """Leading blocks that need no (other) save order."""
    has_saves: bool = False


class SchedulerSide:
    """Lookups, and the orders for each step."""

    def __init__(
        self,
        link: PoolLink,
        options: Options,
        block_size: int,
        keys: KeysOfRequests,
        *,
        may_load_layerwise: bool,
        are_steps_apart: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`are_steps_apart`: a step is over before the next one is planned."""
        self._link = link
        self._options = options
        self._block_size = block_size
        self._keys = keys
        self._may_load_layerwise = may_load_layerwise
        self._are_steps_apart = are_steps_apart
        self._clock = clock
        self._rates = Rates(clock)
        self._num_step_tokens = 0
        self._step: tuple[int, float] | None = None
        """Tokens and beginning of a step that is to be timed."""
        self._lookups: Lookups | None = None
        self._specs: Mapping[Rank, RankSpec] = {}
        self._requests: dict[str, _Tracked] = {}
        self._orders = StepOrders()
        self.totals = StepReport()

    def ranks_known(self, specs: Mapping[Rank, RankSpec]) -> None:
        """Every worker has said what its pages are; until then nothing is looked up."""
        self._specs = specs
        self._lookups = Lookups(self._link, specs, self._options.lookup_timeout_s)

    def introduction(self) -> dict[str, dict[str, str]] | None:
        """The namespace of the first rank's blocks; None while it is not known."""
        if not self._specs:
            return None
        return {INTRODUCTION: {"namespace": self._specs[min(self._specs)].namespace.hex()}}

    def num_tokens_to_load(self, request: EngineRequest, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens beyond vLLM's own hit, and whether they are loaded between steps; None: ask again."""
        tracked = self._track(request)
        first = num_computed_tokens // self._block_size
        # One token at least is computed, since its logits are wanted.
        usable = (request.num_tokens - 1) // self._block_size
        if tracked.gave_up or usable <= first or self._lookups is None or not self._link.is_available:
            self._drop_lookup(tracked)
            return 0, False
        lookup = tracked.lookup
        if lookup is not None and (lookup.first_block > first or lookup.is_stale):
            self._drop_lookup(tracked)
            lookup = None
        if lookup is None:
            lookup = tracked.lookup = self._lookups.start(first, self._keys.of(request)[first:usable])
        answer = lookup.answer()
        if answer is None:
            return None, False
        tracked.local_blocks = first
        num_tokens = (lookup.first_block + answer.num_blocks - first) * self._block_size
        if num_tokens < max(1, self._options.min_load_tokens) or not self._rates.is_worth_loading(
            self._distance(answer)
        ):
            return 0, False
        return num_tokens, not self._is_layerwise(answer)

    def blocks_allocated(self, request: EngineRequest, blocks: Sequence[int], num_tokens: int) -> None:
        """vLLM has taken blocks for the request, of which `num_tokens` tokens are to be loaded."""
        tracked = self._track(request)
        tracked.blocks = list(blocks)
        lookup, tracked.lookup = tracked.lookup, None
        if lookup is None:
            return
        answer = lookup.answer() if num_tokens else None
        if answer is None or not answer.num_blocks:
            lookup.give_up()
            return
        lookup.hand_over()
        first = tracked.local_blocks
        skipped = first - lookup.first_block
        count = num_tokens // self._block_size
        tracked.load_blocks = blocks[first : first + count]
        tracked.is_loading = not self._is_layerwise(answer)
        self._orders.loads.append(
            LoadOrder(
                request_id=request.request_id,
                is_layerwise=not tracked.is_loading,
                blocks=tracked.load_blocks,
                keys=lookup.keys[skipped : skipped + count],
                hits={rank: hit.part(skipped, skipped + count) for rank, hit in answer.hits.items()},
            )
        )

    def request_scheduled(
        self, request_id: str, blocks: Iterable[int], num_computed_tokens: int, num_new_tokens: int, *, is_anew: bool
    ) -> None:
        """The coming step computes tokens of a request; `blocks` are those it has got, or all it has if it begins anew."""
        self._num_step_tokens += num_new_tokens
        tracked = self._requests.get(request_id)
        if tracked is None:
            return
        if is_anew:
            tracked.blocks = list(blocks)
            tracked.num_saved = 0
        else:
            tracked.blocks.extend(blocks)
        # After a load failed vLLM goes back, and computes what was to be loaded.
        tracked.num_saved = min(tracked.num_saved, num_computed_tokens // self._block_size)
        self._order_save(tracked, num_computed_tokens + num_new_tokens)

    def take_orders(self, preempted: Iterable[str]) -> StepOrders:
        """For the coming step."""
        orders, self._orders = self._orders, StepOrders()
        # Steps that load as they compute, or that overlap, say nothing of the model's speed.
        self._step = None if orders.loads or not self._are_steps_apart else (self._num_step_tokens, self._clock())
        self._num_step_tokens = 0
        orders.preempted.update(preempted)
        return orders

    def request_finished(self, request: EngineRequest, blocks: Sequence[int], num_final_tokens: int) -> bool:
        """Whether vLLM must keep the blocks until they are reported as sent."""
        tracked = self._requests.pop(request.request_id, None)
        if tracked is None:
            return False
        self._drop_lookup(tracked)
        self._drop_orders(request.request_id)
        if tracked.is_loading:
            self._keys.forget(request.request_id)
            self._orders.dropped.add(request.request_id)
            return False
        tracked.blocks = list(blocks)
        self._order_save(tracked, num_final_tokens)
        self._keys.forget(request.request_id)
        if tracked.has_saves:
            self._orders.held.add(request.request_id)
        return tracked.has_saves

    def step_done(self, received: Iterable[str], bad_blocks: set[int], report: StepReport | None) -> None:
        """What the workers have told after a step."""
        if self._step is not None:
            num_tokens, began = self._step
            self._rates.computed(num_tokens, self._clock() - began)
            self._step = None
        for request_id in received:
            if request_id in self._requests:
                self._requests[request_id].is_loading = False
        if bad_blocks:
            for tracked in self._requests.values():
                tracked.gave_up |= not bad_blocks.isdisjoint(tracked.load_blocks)
        if report is not None:
            self._rates.loaded(report.loaded_tokens, report.load_s)
            self.totals.add(report)

    def flush(self) -> bool:
        """Drop all pages of this model, whoever wrote them: its weights have changed. Whether they are dropped."""
        for tracked in self._requests.values():
            self._drop_lookup(tracked)
        self._orders.voids_saves = True
        try:
            for spec in self._specs.values():
                self._link.call(Flush(spec.namespace), Flushed).result(FLUSH_S_MAX)
        except (StrataError, TimeoutError) as error:
            log.warning("flush_failed", error=str(error))
            return False
        return True

    def close(self) -> None:
        """Give all leases back and let go of the pool."""
        for tracked in self._requests.values():
            self._drop_lookup(tracked)
        for order in self._orders.loads:
            release(self._link, order.hits)
        self._requests.clear()
        self._link.close()

    def _track(self, request: EngineRequest) -> _Tracked:
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            tracked = self._requests[request.request_id] = _Tracked(request)
        return tracked

    def _drop_lookup(self, tracked: _Tracked) -> None:
        lookup, tracked.lookup = tracked.lookup, None
        if lookup is not None:
            lookup.give_up()

    def _drop_orders(self, request_id: str) -> None:
        """Those that no worker has seen."""
        for order in self._orders.loads:
            if order.request_id == request_id:
                release(self._link, order.hits)
        self._orders.loads = [order for order in self._orders.loads if order.request_id != request_id]

    def _is_layerwise(self, answer: Answer) -> bool:
        if not self._may_load_layerwise or self._options.load is LoadMode.BETWEEN_STEPS:
            return False
        if self._options.load is LoadMode.LAYERWISE:
            return True
        return self._distance(answer) is Distance.NEAR

    def _distance(self, answer: Answer) -> Distance:
        """That of the farthest rank's pages."""
        distances = [hit.distance(self._specs[rank].node) for rank, hit in answer.hits.items()]
        return Distance.FAR if Distance.FAR in distances else Distance.NEAR

    def _order_save(self, tracked: _Tracked, num_final_tokens: int) -> None:
        if not self._options.save or not self._link.is_available:
            return
        keys = self._keys.of(tracked.request)
        num_full = min(len(keys), len(tracked.blocks), num_final_tokens // self._block_size)
        if num_full <= tracked.num_saved:
            return
        span = slice(tracked.num_saved, num_full)
        self._orders.saves.append(SaveOrder(tracked.request.request_id, tracked.blocks[span], keys[span]))
        tracked.num_saved = num_full
        tracked.has_saves = True
