"""What the scheduler's side tells the workers' side for one step, and what it gets told back. Sent between processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from stratakv.integrations.vllm.rates import Distance
from stratakv.keys import BlockKey, Namespace
from stratakv.wire import Place, Segment

Rank = tuple[int, int]
"""(tensor-parallel, pipeline-parallel): each rank keeps its share of a block as a page in a namespace of its own."""


@dataclass(frozen=True, slots=True)
class RankSpec:
    """What a rank tells the scheduler once it knows its KV tensors."""

    namespaces: Sequence[Namespace]
    """Of each group's pages."""
    node: str | None
    """The daemon of its host."""


@dataclass(frozen=True, slots=True)
class RankHit:
    """Where one rank's pages of some consecutive blocks lie, and the lease that pins them there."""

    places: Sequence[Place]
    segments: Sequence[Segment]
    lease_id: int

    def distance(self, node: str | None) -> Distance:
        """From that daemon's host."""
        return Distance.NEAR if all(place.node == node for place in self.places) else Distance.FAR

    def part(self, start: int, stop: int) -> RankHit:
        return RankHit(self.places[start:stop], self.segments, self.lease_id)


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """Blocks of one group that are to be filled."""

    group: int
    blocks: Sequence[int]
    keys: Sequence[BlockKey]
    hits: dict[Rank, RankHit]


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Fill these blocks of vLLM. From here on the leases are the worker's to give back."""

    request_id: str
    is_layerwise: bool
    num_tokens: int
    parts: Sequence[GroupLoad]
    """Only groups of which something is to be filled."""


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """Write these blocks of one group to the pool, which are full once this step is done."""

    request_id: str
    group: int
    blocks: Sequence[int]
    keys: Sequence[BlockKey]
    hold: int = 0
    """By this number the worker says that it is over; 0 if nobody waits for that."""


@dataclass(slots=True)
class StepOrders:
    """Everything for one step."""

    loads: list[LoadOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    preempted: set[str] = field(default_factory=set)
    """vLLM has taken their blocks away: nothing that is still being saved of them may become visible."""
    held: set[str] = field(default_factory=set)
    """Finished; vLLM keeps their blocks until they are reported as sent."""
    dropped: set[str] = field(default_factory=set)
    """Finished while loading: stop, and report them as received."""
    voids_saves: bool = False
    """Nothing that is still being saved may become visible: the cache was reset."""


@dataclass(slots=True)
class StepReport:
    """What one rank has to tell after a step."""

    loaded_tokens: Counter[Distance] = field(default_factory=Counter)
    load_s: dict[Distance, float] = field(default_factory=dict)
    loads: int = 0
    failed_loads: int = 0
    saved_blocks: int = 0
    dropped_saves: int = 0
    over: Counter[int] = field(default_factory=Counter)
    """Holds whose saves are over, and how many ranks say so."""

    def __bool__(self) -> bool:
        return bool(self.loads or self.failed_loads or self.saved_blocks or self.dropped_saves or self.over)

    def add(self, other: StepReport) -> None:
        self.loaded_tokens.update(other.loaded_tokens)
        for distance, seconds in other.load_s.items():
            self.load_s[distance] = self.load_s.get(distance, 0.0) + seconds
        self.loads += other.loads
        self.failed_loads += other.failed_loads
        self.saved_blocks += other.saved_blocks
        self.dropped_saves += other.dropped_saves
        self.over.update(other.over)
