"""What the engine asks of the tiers below its own paged cache (L1).

The engine knows blocks of L1 and nothing of daemons or meta servers. Before a request reaches the engine, the worker's
asynchronous side has already asked the lower tiers for its prefix and hands the answer over as an `ExternalHit`; for a request
that it had to preempt the engine asks again itself (`find`). While a step runs, the engine waits for each layer to arrive
(`LoadJob`) and says when each layer of a new block is finished (`SaveJob`). All calls come from the engine's thread; only
`wait_layer` may block, and only until its own deadline.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Protocol

from stratakv.errors import StrataError
from stratakv.keys import BlockKey


class Tier(enum.StrEnum):
    """Where a prompt token's KV came from."""

    COMPUTED = "computed"
    L1 = "l1"
    L2 = "l2"
    POOL = "pool"
    DISK = "disk"


class KVLoadError(StrataError):
    """Some blocks of a load did not arrive whole; only the first `num_good_blocks` of the load may be used."""

    code = "kv_load_failed"

    def __init__(self, message: str, num_good_blocks: int) -> None:
        super().__init__(message)
        self.num_good_blocks = num_good_blocks


class LoadJob(Protocol):
    """One running load of consecutive blocks into L1."""

    def wait_layer(self, layer: int) -> None:
        """Return when this layer of every block is in L1 and verified. Raises KVLoadError."""

    def cancel(self) -> None:
        """Stop as soon as possible; on return nothing writes into L1 any more."""


class ExternalHit(Protocol):
    """A prefix that lower tiers hold beyond what L1 may hold: blocks `start_block` .. `start_block + num_blocks - 1`."""

    @property
    def start_block(self) -> int: ...

    @property
    def tiers(self) -> Sequence[Tier]:
        """The tier of each block, in order."""

    def load(self, first_block: int, l1_blocks: Sequence[int]) -> LoadJob:
        """Start loading blocks `first_block`, `first_block` + 1, … (indexes in the prompt) into the given L1 blocks."""

    def load_ahead(self, first_block: int, l1_blocks: Sequence[int]) -> LoadJob:
        """`load` before the request's turn, without holding up the loads of others."""

    def release(self) -> None:
        """Give the leases back. Safe to call more than once."""


class SaveJob(Protocol):
    """The write-down of blocks that a step fills."""

    def layer_done(self, layer: int) -> None:
        """This layer of every block of the job is final in L1."""

    def abort(self) -> None:
        """The step failed; nothing of the job may become visible."""


OnFound = Callable[[ExternalHit | None], None]


class KVConnector(Protocol):
    """The tiers below L1."""

    def find(self, keys: Sequence[BlockKey], num_l1_blocks: int, on_found: OnFound) -> None:
        """Look for what a preempted request had computed, beyond its first `num_l1_blocks` blocks.

        `on_found` is called soon, from any thread and exactly once: with a hit, which the engine releases, or with None where
        nothing is there that is quicker to load than to compute.
        """

    def save(
        self, keys: Sequence[BlockKey], l1_blocks: Sequence[int], owner: int, on_finished: Callable[[], None]
    ) -> SaveJob | None:
        """Begin to write down blocks that the coming step will fill for an owner.

        The engine keeps the L1 blocks referenced until `on_finished` is called (from any thread, exactly once, also after
        a failure or `abort`). None means that nothing is to be saved; `on_finished` is then not called.
        """
