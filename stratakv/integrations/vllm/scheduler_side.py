"""The part of the connector that runs in vLLM's scheduler: it decides what is loaded and saved, and moves nothing.

Called from the scheduler's thread only. Every request that vLLM admits is known here from its first lookup until it is finished;
what it holds in the pool (leases) and of vLLM (blocks of saves under way) is given back then.

Requests are measured in tokens, hits in steps (`KVGroups.step_tokens`), block tables by group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from stratakv.errors import StrataError
from stratakv.integrations.link import PoolLink
from stratakv.integrations.vllm.counters import Counts, counted
from stratakv.integrations.vllm.groups import KVGroups
from stratakv.integrations.vllm.holds import EngineCache, Held, Holds
from stratakv.integrations.vllm.lookups import Lookup, Lookups, release
from stratakv.integrations.vllm.options import LoadMode, Options
from stratakv.integrations.vllm.orders import GroupLoad, LoadOrder, Rank, RankSpec, SaveOrder, StepOrders, StepReport
from stratakv.integrations.vllm.prefix_search import Answer
from stratakv.integrations.vllm.rates import Distance, Rates, farthest
from stratakv.integrations.vllm.tracked import EngineRequest, KeysOfRequests, Tracked
from stratakv.log import EventLogger
from stratakv.wire import Flush, Flushed

log = EventLogger("stratakv.vllm.scheduler")

FLUSH_S_MAX = 5.0
NULL_BLOCK = 0
"""What vLLM puts into a block table where it has freed a block, or never took one."""
INTRODUCTION = "stratakv"
"""A request with this key in its `kv_transfer_params` is answered with what blocks these are: a router asks so."""


class SchedulerSide:
    """Lookups, and the orders for each step."""

    def __init__(
        self,
        link: PoolLink,
        options: Options,
        groups: KVGroups,
        keys: KeysOfRequests,
        *,
        may_load_layerwise: bool,
        are_steps_apart: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`are_steps_apart`: a step is over before the next one is planned."""
        self._link = link
        self._options = options
        self._groups = groups
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
        self._cache: EngineCache | None = None
        self._holds: Holds | None = None
        self._requests: dict[str, Tracked] = {}
        self._orders = StepOrders()
        self._untold = StepReport()

    def cache_known(self, cache: EngineCache) -> None:
        """vLLM's cache, of which blocks can be held."""
        self._cache = cache

    def ranks_known(self, specs: Mapping[Rank, RankSpec]) -> None:
        """Every worker has said what its pages are; until then nothing is looked up."""
        self._specs = specs
        self._lookups = Lookups(self._link, specs, self._groups, self._options.lookup_timeout_s)
        self._holds = Holds(self._cache, len(specs)) if self._cache is not None else None

    def introduction(self) -> dict[str, dict[str, str]] | None:
        """The namespace of the first rank's blocks, of a group that keeps all of them; None while it is not known."""
        if not self._specs:
            return None
        whole = [n for n, group in enumerate(self._groups.groups) if group.is_whole]
        namespace = self._specs[min(self._specs)].namespaces[whole[0] if whole else 0]
        return {INTRODUCTION: {"namespace": namespace.hex()}}

    def num_tokens_to_load(self, request: EngineRequest, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens beyond vLLM's own hit, and whether they are loaded between steps; None: ask again."""
        tracked = self._track(request)
        step_tokens = self._groups.step_tokens
        first = num_computed_tokens // step_tokens
        # One token at least is computed, since its logits are wanted.
        usable = (request.num_tokens - 1) // step_tokens
        if tracked.gave_up or usable <= first or self._lookups is None or not self._link.is_available:
            self._drop_lookup(tracked)
            return 0, False
        lookup = tracked.lookup
        if lookup is not None and (lookup.first_step > first or lookup.is_stale):
            self._drop_lookup(tracked)
            lookup = None
        if lookup is None:
            lookup = tracked.lookup = self._lookups.start(first, usable, self._keys.of(request))
        answer = lookup.answer()
        if answer is None:
            return None, False
        tracked.local_steps = first
        num_tokens = (lookup.first_step + answer.num_steps - first) * step_tokens
        if num_tokens < max(1, self._options.min_load_tokens) or not self._rates.is_worth_loading(
            self._distance(answer)
        ):
            return 0, False
        return num_tokens, not self._is_layerwise(answer)

    def blocks_allocated(self, request: EngineRequest, tables: Sequence[Sequence[int]], num_tokens: int) -> None:
        """vLLM has taken blocks for the request, of which `num_tokens` tokens are to be loaded."""
        tracked = self._track(request)
        tracked.tables = [list(table) for table in tables]
        lookup, tracked.lookup = tracked.lookup, None
        if lookup is None:
            return
        answer = lookup.answer() if num_tokens else None
        if answer is None or not answer.num_steps:
            lookup.give_up()
            return
        lookup.hand_over()
        skipped = tracked.local_steps - lookup.first_step
        stop = skipped + num_tokens // self._groups.step_tokens
        # The ends of windows were looked for there.
        assert stop == answer.num_steps or all(group.is_whole for group in self._groups.groups)
        parts = [self._part(tracked, lookup, answer, group, range(skipped, stop)) for group in answer.groups]
        tracked.load_blocks = [block for part in parts for block in part.blocks]
        tracked.is_loading = not self._is_layerwise(answer)
        for part in parts:
            if not part.blocks:
                release(self._link, part.hits.items())
        self._orders.loads.append(
            LoadOrder(
                request_id=request.request_id,
                is_layerwise=not tracked.is_loading,
                num_tokens=num_tokens,
                parts=[part for part in parts if part.blocks],
            )
        )

    def request_scheduled(
        self,
        request_id: str,
        tables: Sequence[Iterable[int]],
        num_computed_tokens: int,
        num_new_tokens: int,
        *,
        is_anew: bool,
    ) -> None:
        """The coming step computes tokens of a request; `tables` are its new blocks, or all it has if it begins anew."""
        self._num_step_tokens += num_new_tokens
        tracked = self._requests.get(request_id)
        if tracked is None:
            return
        if is_anew:
            tracked.tables = [list(blocks) for blocks in tables]
            tracked.saved_tokens = 0
        else:
            for table, blocks in zip(tracked.tables, tables, strict=False):
                table.extend(blocks)
        # After a load failed vLLM goes back, and computes what was to be loaded.
        tracked.saved_tokens = min(tracked.saved_tokens, num_computed_tokens)
        self._order_saves(tracked, num_computed_tokens + num_new_tokens)

    def take_orders(self, preempted: Iterable[str]) -> StepOrders:
        """For the coming step."""
        orders, self._orders = self._orders, StepOrders()
        # Steps that load as they compute, or that overlap, say nothing of the model's speed.
        self._step = None if orders.loads or not self._are_steps_apart else (self._num_step_tokens, self._clock())
        self._num_step_tokens = 0
        orders.preempted.update(preempted)
        return orders

    def request_finished(self, request: EngineRequest, tables: Sequence[Sequence[int]], num_final_tokens: int) -> bool:
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
        tracked.tables = [list(table) for table in tables]
        self._order_saves(tracked, num_final_tokens)
        self._keys.forget(request.request_id)
        if tracked.has_saves:
            self._orders.held.add(request.request_id)
        return tracked.has_saves

    def step_done(
        self, received: Iterable[str], failed: Iterable[str], bad_blocks: set[int], report: StepReport | None
    ) -> None:
        """What the workers have told after a step: requests that have loaded or could not, and blocks that did not come."""
        if self._step is not None:
            num_tokens, began = self._step
            self._rates.computed(num_tokens, self._clock() - began)
            self._step = None
        for request_id in received:
            if request_id in self._requests:
                self._requests[request_id].is_loading = False
        for request_id in failed:
            if request_id in self._requests:
                self._requests[request_id].gave_up = True
        if bad_blocks:
            for tracked in self._requests.values():
                tracked.gave_up |= not bad_blocks.isdisjoint(tracked.load_blocks)
        if report is not None:
            self._rates.loaded(report.loaded_tokens, report.load_s)
            self._untold.add(report)
            if self._holds is not None:
                self._holds.over(report.over)

    def take_counts(self) -> Counts:
        """What the workers have told since the last time."""
        untold, self._untold = self._untold, StepReport()
        return counted(untold)

    def flush(self) -> bool:
        """Drop all pages of this model, whoever wrote them: its weights have changed. Whether they are dropped."""
        for tracked in self._requests.values():
            self._drop_lookup(tracked)
        self._orders.voids_saves = True
        try:
            for namespace in (namespace for spec in self._specs.values() for namespace in spec.namespaces):
                self._link.call(Flush(namespace), Flushed).result(FLUSH_S_MAX)
        except (StrataError, TimeoutError) as error:
            log.warning("flush_failed", error=str(error))
            return False
        return True

    def close(self) -> None:
        """Give all leases back and let go of the pool."""
        for tracked in self._requests.values():
            self._drop_lookup(tracked)
        for order in self._orders.loads:
            self._release_order(order)
        self._requests.clear()
        self._link.close()

    def _track(self, request: EngineRequest) -> Tracked:
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            tracked = self._requests[request.request_id] = Tracked(request)
        return tracked

    def _drop_lookup(self, tracked: Tracked) -> None:
        lookup, tracked.lookup = tracked.lookup, None
        if lookup is not None:
            lookup.give_up()

    def _drop_orders(self, request_id: str) -> None:
        """Those that no worker has seen."""
        for order in self._orders.loads:
            if order.request_id == request_id:
                self._release_order(order)
        self._orders.loads = [order for order in self._orders.loads if order.request_id != request_id]

    def _is_layerwise(self, answer: Answer) -> bool:
        if not self._may_load_layerwise or self._options.load is LoadMode.BETWEEN_STEPS:
            return False
        if self._options.load is LoadMode.LAYERWISE:
            return True
        return self._distance(answer) is Distance.NEAR

    def _distance(self, answer: Answer) -> Distance:
        """That of the farthest page."""
        return farthest(hit.distance(self._specs[rank].node) for rank, hit in answer.hits)

    def _release_order(self, order: LoadOrder) -> None:
        for part in order.parts:
            release(self._link, part.hits.items())

    def _part(self, tracked: Tracked, lookup: Lookup, answer: Answer, group: int, steps: range) -> GroupLoad:
        """What is to be loaded of a group; `steps` count from the first that was looked up."""
        kind, found = self._groups.groups[group], answer.groups[group]
        ratio = self._groups.step_tokens // kind.block_size
        start, stop = max(found.first, steps.start * ratio), steps.stop * ratio
        base, table = lookup.first_step * ratio, tracked.tables[group]
        while not kind.is_whole and start < stop and table[base + start] == NULL_BLOCK:
            start += 1
        start = min(start, stop)
        return GroupLoad(
            group,
            table[base + start : base + stop],
            lookup.keys[group][start:stop],
            {rank: hit.part(start - found.first, stop - found.first) for rank, hit in found.hits.items()},
        )

    def _order_saves(self, tracked: Tracked, num_final_tokens: int) -> None:
        if not self._options.save or not self._link.is_available:
            return
        keys = self._keys.of(tracked.request)
        kinds = list(zip(self._groups.groups, tracked.tables, strict=True))
        ends = [len(table) * kind.block_size for kind, table in kinds]
        num_tokens = min(num_final_tokens, len(keys) * self._groups.key_tokens, *ends)
        for group, (kind, table) in enumerate(kinds):
            start, stop = tracked.saved_tokens // kind.block_size, num_tokens // kind.block_size
            if start >= stop:
                continue
            of_blocks = self._groups.keys_of(kind, keys, start, stop)
            if kind.is_whole:
                order = SaveOrder(tracked.request.request_id, group, table[start:stop], of_blocks)
            else:
                held = self._hold(tracked.request.request_id, group, start, stop)
                if held is None:
                    continue
                of_held = [of_blocks[n - start] for n in held.indexes]
                order = SaveOrder(tracked.request.request_id, group, held.blocks, of_held, held.number)
            self._orders.saves.append(order)
            tracked.has_saves = True
        tracked.saved_tokens = max(tracked.saved_tokens, num_tokens)

    def _hold(self, request_id: str, group: int, start: int, stop: int) -> Held | None:
        return self._holds.take(request_id, group, start, stop) if self._holds is not None else None
