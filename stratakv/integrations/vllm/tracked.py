"""A request of vLLM's, as far as the pool is concerned; and what is read of vLLM's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stratakv.integrations.vllm.lookups import Lookup
from stratakv.keys import BlockKey


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
class Tracked:
    """One request, as far as the pool is concerned."""

    request: EngineRequest
    tables: list[list[int]] = field(default_factory=list)
    """By group; what vLLM has freed since it told is still there."""
    lookup: Lookup | None = None
    local_steps: int = 0
    """vLLM's own hit when it asked last."""
    load_blocks: Sequence[int] = ()
    """All blocks of the last load."""
    is_loading: bool = False
    """Between steps."""
    gave_up: bool = False
    """A load failed: the rest is computed, whatever the pool says."""
    saved_tokens: int = 0
    """Full blocks of so many tokens need no (other) save order."""
    has_saves: bool = False
