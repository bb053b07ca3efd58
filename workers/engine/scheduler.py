"""Which tokens the next step computes: one for every decoding sequence, then prompts in order of arrival.

A step has a token budget; a prompt that exceeds it is computed in chunks. Sequences get the blocks of their whole prompt
when they are admitted and one more whenever they outgrow them; when none are left, the newest sequence is preempted: it
gives its blocks back and goes on later, from what the prefix cache has kept, then from what the tiers below have if that is
quicker to load than to compute. A sequence whose next block is just being computed by another one waits for it instead of
computing it again. For those that wait, blocks are loaded ahead (`workers.engine.loads_ahead`).

Nobody starves: the oldest running sequence is never preempted for another one and gets tokens in every step, a preempted one
is the first to be admitted again, and only those that wait for a running one's blocks are overtaken.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Blocks
from dataclasses import dataclass

from stratakv.keys import BlockKey
from workers.engine.config import EngineConfig
from workers.engine.connector import ExternalHit, LoadJob, Tier
from workers.engine.kv_cache import KVCache
from workers.engine.loads_ahead import LoadsAhead
from workers.engine.sequence import Search, Sequence

_MAX_SET_ASIDE_BLOCKS = 32
"""Blocks kept free behind a sequence so that it can grow in place."""
_WATERMARK_SHARE = 0.01
"""Share of the blocks left for running sequences to grow into when another one is admitted."""


@dataclass(slots=True, eq=False)
class StepPart:
    """One sequence's tokens in a step: `num_tokens` from `sequence.num_computed` on."""

    sequence: Sequence
    num_tokens: int
    load_first_block: int | None = None
    """Blocks from here up to `num_computed` are to be loaded from lower tiers during this step."""
    load_tiers: Blocks[Tier] = ()
    """Theirs."""
    load_job: LoadJob | None = None
    """Loads them already."""

    @property
    def stop(self) -> int:
        return self.sequence.num_computed + self.num_tokens

    @property
    def samples(self) -> bool:
        """The step reaches the sequence's last token."""
        return self.stop == len(self.sequence.token_ids)


class Scheduler:
    """Queues of waiting and running sequences. Owned by the engine's thread.

    `find` begins to look below L1 for what a sequence has lost, beyond so many blocks that L1 has kept; False if there is nothing
    below. The answer is given to `found`.
    """

    def __init__(
        self,
        config: EngineConfig,
        cache: KVCache,
        release_held: Callable[[Blocks[int]], None],
        find: Callable[[Sequence, int], bool],
    ) -> None:
        self._config = config
        self._cache = cache
        self._release_held = release_held
        self._find = find
        self.ahead = LoadsAhead(cache, config.load_ahead_requests, config.load_ahead_bytes)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of admission."""
        self.num_preemptions = 0
        self.recovered_tokens: Counter[Tier] = Counter()
        """Tokens that preempted sequences had computed, by where their KV came from when they went on."""

    def sequences(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def schedule(self) -> list[StepPart]:
        """The next step; empty if there is nothing to do, or nothing can be done until blocks are released."""
        parts = self._schedule_decodes()
        budget = self._config.max_batched_tokens - len(parts)
        if parts:
            budget = min(budget, self._config.max_prefill_tokens_beside_decode)
        for sequence in self.running:
            if budget > 0 and not sequence.is_decoding:
                parts.append(StepPart(sequence, min(budget, sequence.num_uncomputed)))
                budget -= parts[-1].num_tokens
        parts += self._admit(budget)
        if self.waiting:
            self.ahead.begin(self.waiting, self._match, self._promised, self._num_spare)
        return parts

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, whatever its state, and give back what it holds."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
            self.ahead.drop(sequence)
        self._give_back(sequence)
        sequence.search = Search.NONE
        sequence.release_external()
        self._release_held(sequence.take_held())

    def found(self, sequence: Sequence, hit: ExternalHit | None) -> None:
        """What `find` has come to. The sequence may have ended meanwhile."""
        if sequence.search is Search.RUNNING:
            sequence.search = Search.NONE
            sequence.external = hit
        elif hit is not None:
            hit.release()

    def computed(self, part: StepPart) -> None:
        """A part's KV is whole in L1: let its full blocks be found by others."""
        sequence, stop = part.sequence, part.stop
        if sequence.preemptions:
            self._count_recovered(part.load_tiers)
        sequence.num_computed = stop
        full = stop // self._config.block_size
        if self._config.prefix_caching:
            for index in range(sequence.num_registered, full):
                self._cache.register(sequence.keys[index], sequence.table.blocks[index])
        sequence.num_registered = full

    def load_failed(self, part: StepPart, num_good_blocks: int) -> None:
        """Keep the blocks of a part's load that arrived whole; the others are computed by later steps, in place."""
        sequence, first = part.sequence, part.load_first_block
        assert first is not None
        size = self._config.block_size
        kept = min(num_good_blocks, len(part.load_tiers))
        if sequence.preemptions:
            self._count_recovered(part.load_tiers[:kept])
            self.recovered_tokens[Tier.COMPUTED] += (len(part.load_tiers) - kept) * size
        else:
            for tier in part.load_tiers[kept:]:
                sequence.tokens_by_tier[tier] -= size
                sequence.tokens_by_tier[Tier.COMPUTED] += size
        sequence.num_computed = (first + kept) * size

    def _schedule_decodes(self) -> list[StepPart]:
        parts: list[StepPart] = []
        for sequence in [s for s in self.running if s.is_decoding]:
            if len(parts) < self._config.max_batched_tokens and sequence in self.running and self._grow(sequence):
                parts.append(StepPart(sequence, 1))
        return [part for part in parts if part.sequence in self.running]

    def _grow(self, sequence: Sequence) -> bool:
        """A slot for the next token, by preempting newer sequences if need be; False if the sequence itself had to go."""
        if sequence.table.num_slots > sequence.num_computed:
            return True
        while True:
            growth = min(max(0, sequence.blocks_left - 1), _MAX_SET_ASIDE_BLOCKS)
            blocks = self._cache.allocate(1, sequence.table.blocks[-1], growth)
            if blocks is not None:
                sequence.table.extend(blocks)
                return True
            if self.ahead.drop_last(self.waiting):
                continue
            newest = self.running[-1]
            self._preempt(newest)
            if newest is sequence:
                return False

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.num_lost = sequence.num_computed
        sequence.search = Search.WANTED
        self._give_back(sequence)
        sequence.preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self._cache.release(sequence.table.take_from(0))
        sequence.num_computed = sequence.num_registered = 0

    def _admit(self, budget: int) -> list[StepPart]:
        parts: list[StepPart] = []
        promised = self._promised()
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self._config.max_running:
                break
            matched = self._match(sequence)
            following = sequence.keys[len(matched) : sequence.num_reusable_blocks]
            is_promised = bool(following) and following[0] in promised and self._config.prefix_caching
            if is_promised and self.ahead.of(sequence) is None:
                continue
            if not self._place(sequence, matched):
                self._let_go_of_held()
                break
            part = self._start(sequence, len(matched), budget)
            parts.append(part)
            budget -= part.num_tokens
            promised.update(sequence.keys[sequence.num_registered :])
        return parts

    def _promised(self) -> set[BlockKey]:
        """Blocks that running sequences are about to compute, or to load."""
        return {key for s in self.running for key in s.keys[s.num_registered :]}

    def _match(self, sequence: Sequence) -> list[int]:
        if not self._config.prefix_caching:
            return []
        return self._cache.match(sequence.keys[: sequence.num_reusable_blocks])

    def _place(self, sequence: Sequence, matched: list[int]) -> bool:
        """Reference the matched blocks and allocate the rest of the sequence's.

        False if there is no room now, or if the tiers below have not answered yet.
        """
        self._cache.reference(matched)
        loaded = self._loaded_ahead(sequence, len(matched))
        missing = sequence.num_blocks - len(matched) - len(loaded)
        blocks = None
        if self._has_room(sequence, missing) and not self._searches(sequence, matched):
            growth = min(max(0, sequence.blocks_left - sequence.num_blocks), _MAX_SET_ASIDE_BLOCKS)
            before = [*matched, *loaded]
            blocks = self._cache.allocate(missing, before[-1] if before else None, growth)
        if blocks is None:
            self._cache.release(matched)
            return False
        sequence.table.extend(matched)
        sequence.table.extend(loaded)
        sequence.table.extend(blocks)
        return True

    def _loaded_ahead(self, sequence: Sequence, num_matched: int) -> Blocks[int]:
        """Blocks behind the matched ones that are loaded already, or being loaded."""
        load = self.ahead.of(sequence)
        if load is None:
            return ()
        if len(load.matched) != num_matched:  # another sequence has computed some of them meanwhile
            self.ahead.drop(sequence)
            return ()
        return load.blocks

    def _has_room(self, sequence: Sequence, num_blocks: int) -> bool:
        """Whether so many blocks can be had without taking from those that run; those that wait behind it give back theirs."""
        while num_blocks + self._watermark(sequence) > self._cache.num_available:
            if not self.ahead.drop_last(self.waiting, before=sequence):
                return False
        return True

    def _watermark(self, sequence: Sequence) -> int:
        """Blocks that must stay available to those that run already."""
        if not self.running:
            return 0
        # One that came back too early would be preempted again by the next block that another one needs.
        return self._num_spare if sequence.preemptions else self._num_spare - len(self.running)

    @property
    def _num_spare(self) -> int:
        """Blocks that those that run will probably need next."""
        return int(self._cache.num_blocks * _WATERMARK_SHARE) + 1 + len(self.running)

    def _searches(self, sequence: Sequence, matched: Blocks[int]) -> bool:
        """Whether the tiers below are being asked for what a preempted sequence has lost; begins to, if L1 lacks any."""
        if sequence.search is Search.WANTED:
            num_lost = min(sequence.num_lost // self._config.block_size, sequence.num_reusable_blocks)
            is_asked = num_lost > len(matched) and self._find(sequence, len(matched))
            sequence.search = Search.RUNNING if is_asked else Search.NONE
        return sequence.search is Search.RUNNING

    def _let_go_of_held(self) -> None:
        """Where nothing runs, what is held for those that wait must not keep the first of them from starting."""
        if not self.running:
            for waiting in self.waiting:
                self._release_held(waiting.take_held())

    def _start(self, sequence: Sequence, num_matched: int, budget: int) -> StepPart:
        """Move a placed sequence to the running ones and plan its first chunk."""
        self.waiting.remove(sequence)
        self.running.append(sequence)
        tiers = sequence.tiers_below(num_matched)
        load = self.ahead.of(sequence)
        load_stop = num_matched + len(tiers)
        sequence.num_registered = num_matched
        sequence.num_computed = load_stop * self._config.block_size
        self._count_tiers(sequence, num_matched, tiers)
        self._release_held(sequence.take_held())
        part = StepPart(sequence, min(budget, sequence.num_uncomputed))
        if tiers:
            part.load_first_block, part.load_tiers = num_matched, tiers
            if load is not None:
                part.load_job = load.job
                self.ahead.use(sequence)
        else:
            sequence.release_external()
        return part

    def _count_tiers(self, sequence: Sequence, num_matched: int, loaded: Blocks[Tier]) -> None:
        size = self._config.block_size
        if sequence.preemptions:  # its request's tokens have been counted
            num_kept = min(num_matched * size, sequence.num_lost)
            self.recovered_tokens[Tier.L1] += num_kept
            self.recovered_tokens[Tier.COMPUTED] += max(0, sequence.num_lost - num_kept - len(loaded) * size)
            return
        counts = dict.fromkeys(Tier, 0)
        tiers = dict(zip(sequence.held.blocks, sequence.held.tiers, strict=True))
        for block in sequence.table.blocks[:num_matched]:
            counts[tiers.get(block, Tier.L1)] += size
        for tier in loaded:
            counts[tier] += size
        counts[Tier.COMPUTED] = len(sequence.token_ids) - (num_matched + len(loaded)) * size
        sequence.tokens_by_tier = counts

    def _count_recovered(self, loaded: Blocks[Tier]) -> None:
        for tier in loaded:
            self.recovered_tokens[tier] += self._config.block_size
