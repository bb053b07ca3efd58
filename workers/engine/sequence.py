"""A request inside the engine: its tokens, its blocks, and how far it has got."""

from __future__ import annotations

import enum
from collections.abc import Collection
from collections.abc import Sequence as Blocks
from dataclasses import dataclass, field

from stratakv.keys import NONE_HASH, BlockKey, block_keys, salt_extra
from workers.engine.block_table import BlockTable
from workers.engine.connector import ExternalHit, Tier
from workers.engine.penalties import Penalties
from workers.engine.requests import EngineRequest, OnEvent, RequestUsage
from workers.engine.reservations import HeldBlocks


class Search(enum.Enum):
    """Whether the tiers below L1 are asked for what a preemption lost."""

    NONE = enum.auto()
    """Not needed, or answered."""
    WANTED = enum.auto()
    """Once there is room for the sequence."""
    RUNNING = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request. Changed only by the scheduler and the engine's step."""

    request: EngineRequest
    on_event: OnEvent
    block_size: int
    seed: int
    arrived_at: float
    eos_token_ids: Collection[int] = ()
    token_ids: list[int] = field(init=False)
    """Prompt, resumed and generated tokens."""
    keys: list[BlockKey] = field(init=False)
    """Of the full blocks of `token_ids`."""
    external: ExternalHit | None = field(init=False)
    held: HeldBlocks = field(init=False)
    table: BlockTable = field(init=False)
    penalties: Penalties | None = field(init=False)
    num_computed: int = 0
    """Leading tokens whose KV is in L1."""
    num_registered: int = 0
    """Leading blocks that have been offered to the prefix cache."""
    num_generated: int = 0
    tokens_by_tier: dict[Tier, int] = field(default_factory=dict)
    preemptions: int = 0
    num_lost: int = 0
    """Leading tokens that were computed when it was preempted last."""
    search: Search = Search.NONE
    scheduled_at: float | None = None
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        self.token_ids = [*self.request.token_ids, *self.request.resume_token_ids]
        self.keys = list(self.request.keys)
        self.external = self.request.external
        self.held = self.request.held
        self.table = BlockTable(self.block_size)
        request = self.request
        self.penalties = Penalties.of(request.sampling, request.token_ids, request.resume_token_ids, self.eos_token_ids)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Only the last generated token's KV is missing."""
        return self.num_uncomputed == 1 and self.num_generated > 0

    @property
    def output_index(self) -> int:
        """Index of the next output token."""
        return len(self.token_ids) - len(self.request.token_ids)

    @property
    def num_reusable_blocks(self) -> int:
        """How many leading blocks may come from a cache: at least one token is always computed."""
        return (len(self.token_ids) - 1) // self.block_size

    @property
    def num_blocks(self) -> int:
        """Blocks that all of its tokens need."""
        return -(-len(self.token_ids) // self.block_size)

    @property
    def blocks_left(self) -> int:
        """Blocks that this request will still grow by, at most."""
        total = len(self.request.token_ids) + self.request.sampling.max_tokens
        return max(0, -(-total // self.block_size) - len(self.table.blocks))

    def append(self, token_id: int) -> None:
        """Take a generated token."""
        self.token_ids.append(token_id)
        self.num_generated += 1
        if self.penalties is not None:
            self.penalties.count(token_id)
        if len(self.token_ids) // self.block_size > len(self.keys):
            parent = self.keys[-1] if self.keys else NONE_HASH
            tail = self.token_ids[len(self.keys) * self.block_size :]
            extra = None if self.keys else salt_extra(self.request.cache_salt)
            self.keys += block_keys(tail, self.block_size, first_block_extra=extra, parent=parent)

    def tiers_below(self, num_matched: int) -> Blocks[Tier]:
        """Of the blocks to load behind the matched ones. None if the hit does not adjoin what L1 holds."""
        hit = self.external
        if hit is None or hit.start_block > num_matched:
            return ()
        return hit.tiers[num_matched - hit.start_block : self.num_reusable_blocks - hit.start_block]

    def release_external(self) -> None:
        """Give the leases of the lower tiers back, once."""
        external, self.external = self.external, None
        if external is not None:
            external.release()

    def take_held(self) -> Blocks[int]:
        """The blocks held for it, to be released; there are none afterwards."""
        held, self.held = self.held, HeldBlocks()
        return held.blocks

    def usage(self, now: float) -> RequestUsage:
        scheduled = self.scheduled_at if self.scheduled_at is not None else now
        first_token = self.first_token_at if self.first_token_at is not None else now
        return RequestUsage(
            prompt_tokens=len(self.request.token_ids),
            generated_tokens=self.num_generated,
            tokens_by_tier=dict(self.tokens_by_tier),
            preemptions=self.preemptions,
            queue_time_s=scheduled - self.arrived_at,
            prefill_time_s=first_token - scheduled,
            decode_time_s=now - first_token,
        )
