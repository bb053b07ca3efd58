"""Groups of layers: those of one group share their block tables, and what of a prefix they must hold to go on behind it.

Layers of full attention read all of it. Those of a sliding window, or of attention within chunks, read its end only; vLLM frees
the blocks before that while the request still runs. A model without such layers is one group of full attention.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from stratakv.keys import BlockKey


class Reach(enum.Enum):
    """What of a prefix the next token reads."""

    ALL = enum.auto()
    WINDOW = enum.auto()
    """The last `span` - 1 tokens."""
    CHUNK = enum.auto()
    """Those of its own chunk; chunks of `span` tokens follow each other from the beginning."""


@dataclass(frozen=True, slots=True)
class KVGroup:
    """One group."""

    reach: Reach
    block_size: int
    span: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether all blocks of a prefix are kept."""
        return self.reach is Reach.ALL

    def first_needed(self, num_tokens: int) -> int:
        """The first block of a prefix of so many tokens that is needed to go on behind it."""
        match self.reach:
            case Reach.ALL:
                unread = 0
            case Reach.WINDOW:
                unread = max(0, num_tokens - self.span + 1)
            case Reach.CHUNK:
                unread = num_tokens // self.span * self.span
        return unread // self.block_size


@dataclass(frozen=True, slots=True)
class KVGroups:
    """All groups of a model."""

    groups: tuple[KVGroup, ...]

    @property
    def key_tokens(self) -> int:
        """Tokens from one key to the next: the largest size that divides all groups' blocks."""
        return math.gcd(*(group.block_size for group in self.groups))

    @property
    def step_tokens(self) -> int:
        """A hit is a multiple of so many tokens, which are whole blocks in every group."""
        return math.lcm(*(group.block_size for group in self.groups))

    @property
    def are_plain(self) -> bool:
        """Whether this is one list of blocks, each of which is needed: only then vLLM can be told of single bad blocks."""
        return len(self.groups) == 1 and self.groups[0].is_whole

    def keys_of(self, group: KVGroup, keys: Sequence[BlockKey], start: int, stop: int) -> Sequence[BlockKey]:
        """Of blocks `start` … `stop` - 1 of a group; a block's key is that of its last tokens."""
        ratio = group.block_size // self.key_tokens
        return keys[start:stop] if ratio == 1 else [keys[(n + 1) * ratio - 1] for n in range(start, stop)]
