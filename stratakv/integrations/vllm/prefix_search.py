"""Asks the meta server for the longest prefix of which every group of layers has what is needed to go on behind it.

Groups that need all of a prefix are asked first, and what they have is pinned. Of the others it is asked which blocks are there
at all; then the longest prefix is chosen, and its end pinned. One message per rank and group each time, all at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stratakv.errors import StrataError
from stratakv.integrations.vllm.groups import KVGroups
from stratakv.integrations.vllm.orders import Rank, RankHit, RankSpec
from stratakv.keys import BlockKey, pack_keys
from stratakv.log import EventLogger
from stratakv.pool.meta_client import MetaClient
from stratakv.wire import FindBlocks, FoundBlocks, Match, MatchPrefix

log = EventLogger("stratakv.vllm.lookups")

LEASE_S = 30.0
"""How long what was found stays where it is."""


@dataclass(frozen=True, slots=True)
class GroupHits:
    """Consecutive blocks of one group."""

    first: int
    """The first of them, of those that were asked for."""
    hits: Mapping[Rank, RankHit]


@dataclass(frozen=True, slots=True)
class Answer:
    """What every rank has of some prefix beyond vLLM's own."""

    num_steps: int
    """In `KVGroups.step_tokens`."""
    groups: Mapping[int, GroupHits]
    """By index."""

    @property
    def hits(self) -> Iterable[tuple[Rank, RankHit]]:
        """Of all groups."""
        return (hit for group in self.groups.values() for hit in group.hits.items())


NOTHING = Answer(0, {})


@dataclass(frozen=True, slots=True)
class PrefixSearch:
    """One question."""

    meta: MetaClient
    specs: Mapping[Rank, RankSpec]
    groups: KVGroups
    first_step: int
    """vLLM has the steps before that itself."""
    keys: Sequence[Sequence[BlockKey]]
    """By group: of the blocks from there on."""
    timeout_s: float

    async def run(self) -> Answer:
        """Whatever fails is a miss."""
        kinds = self.groups.groups
        num_steps = min(len(self.keys[n]) // self._ratio(n) for n in range(len(kinds)))
        found = await self._pin({n: self.needed(n, num_steps) for n, kind in enumerate(kinds) if kind.is_whole})
        for n, group in found.items():
            num_steps = min([num_steps, *(len(hit.places) // self._ratio(n) for hit in group.hits.values())])
        ends = [n for n, kind in enumerate(kinds) if not kind.is_whole]
        if ends and num_steps:
            num_steps = await self._restorable(ends, num_steps)
        if ends and num_steps:
            spans = {n: self.needed(n, num_steps) for n in ends}
            pinned = await self._pin(spans)
            found |= pinned
            if any(len(hit.places) < len(spans[n]) for n, group in pinned.items() for hit in group.hits.values()):
                num_steps = 0
        return Answer(num_steps, found)

    def needed(self, group: int, num_steps: int) -> range:
        """Blocks that a group needs beyond vLLM's own to go on behind so many steps more, counted from the first asked for."""
        ratio = self._ratio(group)
        end_tokens = (self.first_step + num_steps) * self.groups.step_tokens
        first = self.groups.groups[group].first_needed(end_tokens) - self.first_step * ratio
        return range(max(0, first), num_steps * ratio)

    def longest(self, present: Mapping[int, Sequence[bool]], num_steps: int) -> int:
        """Steps, at most so many, behind which all of these groups can go on with what is present."""
        runs = {group: _run_starts(blocks) for group, blocks in present.items()}
        for steps in range(num_steps, 0, -1):
            spans = ((group, self.needed(group, steps)) for group in runs)
            if all(runs[group][span.stop] <= span.start for group, span in spans):
                return steps
        return 0

    async def _restorable(self, groups: Sequence[int], num_steps: int) -> int:
        present = await asyncio.gather(*(self._present(n, num_steps * self._ratio(n)) for n in groups))
        return self.longest(dict(zip(groups, present, strict=True)), num_steps)

    async def _present(self, group: int, count: int) -> list[bool]:
        """Which of the first blocks of a group all ranks have."""
        keys = pack_keys(self.keys[group][:count])
        missing = await asyncio.gather(*(self._missing(spec, group, keys, count) for spec in self.specs.values()))
        absent = set().union(*missing)
        return [n not in absent for n in range(count)]

    async def _pin(self, spans: Mapping[int, range]) -> dict[int, GroupHits]:
        """The leading blocks of each span that each rank has."""
        asked = [(n, rank) for n in spans for rank in self.specs]
        matches = await asyncio.gather(*(self._match(self.specs[rank], n, spans[n]) for n, rank in asked))
        hits: dict[int, dict[Rank, RankHit]] = {n: {} for n in spans}
        for (n, rank), match in zip(asked, matches, strict=True):
            hits[n][rank] = RankHit(match.places(), match.segments, match.lease_id)
        return {n: GroupHits(spans[n].start, of_ranks) for n, of_ranks in hits.items()}

    async def _match(self, spec: RankSpec, group: int, span: range) -> Match:
        if not span:
            return Match(0)
        keys = pack_keys(self.keys[group][span.start : span.stop])
        try:
            request = MatchPrefix(spec.namespaces[group], keys, LEASE_S, spec.node or "")
            return await self.meta.call(request, Match, timeout_s=self.timeout_s)
        except StrataError as error:
            log.debug("lookup_failed", error=error.message)
            return Match(0)

    async def _missing(self, spec: RankSpec, group: int, keys: bytes, count: int) -> Sequence[int]:
        try:
            request = FindBlocks(spec.namespaces[group], keys)
            return (await self.meta.call(request, FoundBlocks, timeout_s=self.timeout_s)).missing
        except StrataError as error:
            log.debug("lookup_failed", error=error.message)
            return range(count)

    def _ratio(self, group: int) -> int:
        """Blocks of a group in one step."""
        return self.groups.step_tokens // self.groups.groups[group].block_size


def _run_starts(present: Sequence[bool]) -> list[int]:
    """For each number of leading blocks: where the last run of present ones among them begins."""
    starts = [0]
    for count, there in enumerate(present, 1):
        starts.append(starts[-1] if there else count)
    return starts
