"""The body of POST /handovers: what is told of one request, to the worker that follows it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from stratakv.keys import BlockKey
from workers.handover import messages
from workers.handover.outgoing import HandoverBook, Outgoing
from workers.tiers.tiers import Saved

HANDOVER_WAIT_S = 10.0
"""How long a prefill worker waits for the prompt's blocks to be found in the pool."""
LEASE_S = 10.0
"""They stay there for so long, if the follower stays: it may be reading yet."""


class Source(Protocol):
    """What of the worker is needed here."""

    @property
    def handovers(self) -> HandoverBook: ...

    async def wait_saved(self, keys: Sequence[BlockKey], timeout_s: float, lease_s: float = 0.0) -> Saved: ...

    def release_lease(self, lease_id: int) -> None: ...


async def follow(source: Source, handover: Outgoing) -> AsyncIterator[bytes]:
    """Frames until the follower goes, or needs nothing any more. Closes the hand-over."""
    saving: asyncio.Task[None] | None = None
    until = float("inf")
    try:
        async for message in handover.messages():
            yield messages.frame(message)
            match message:
                case messages.Answered():
                    saving = asyncio.create_task(_hold(source, handover), name=f"hold-{handover.request_id}")
                case messages.GivenUp():
                    return
                case messages.Saved():
                    until = time.monotonic() + LEASE_S
            if time.monotonic() > until:
                return
    finally:
        source.handovers.close(handover)
        if saving is not None:
            saving.cancel()


async def _hold(source: Source, handover: Outgoing) -> None:
    """Tell whether the blocks are in the pool, and keep them there as long as somebody reads."""
    saved = await source.wait_saved(handover.keys, HANDOVER_WAIT_S, LEASE_S)
    try:
        handover.tell(messages.Saved(saved.is_whole))
        await asyncio.sleep(LEASE_S)
    finally:
        source.release_lease(saved.lease_id)
