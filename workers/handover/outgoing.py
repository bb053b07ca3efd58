"""The prefill worker's side: what is told of each request that another worker follows.

The HTTP face opens a hand-over when such a request arrives and tells its end; saves of its blocks, whichever request they are
computed for, tell of themselves (`SaveListener`). One follower reads it. All on the event loop, but for `listener`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Sequence

from stratakv.errors import Overloaded
from stratakv.keys import BlockKey, Namespace, pack_keys
from stratakv.wire import Extent, Segment
from workers.handover.errors import UnknownHandover
from workers.handover.messages import Alive, Answered, AnyMessage, GivenUp, Placed, Written
from workers.tiers.save import SaveListener

HANDOVERS_MAX = 256
"""Followed requests at once."""
MESSAGES_MAX = 8192
"""Not yet read by the follower: it is told no more then."""
KNOWN_S_MAX = 3.0
"""A follower may be here earlier than the request, by so much."""
UNFOLLOWED_S_MAX = 10.0
"""How long what was told of a request is kept when it has ended and nobody has come."""
ALIVE_S = 1.0


class Outgoing:
    """One request's hand-over."""

    def __init__(self, request_id: str, keys: Sequence[BlockKey]) -> None:
        self.request_id = request_id
        self.keys = keys
        self.is_followed = False
        self._messages: deque[AnyMessage] = deque()
        self._told = asyncio.Event()
        self._is_cut = False
        self._is_over = False
        """The end of the request has been told."""

    def tell(self, message: AnyMessage) -> None:
        """Queue a message for the follower."""
        if self._is_cut:
            return
        self._is_over = self._is_over or isinstance(message, Answered | GivenUp)
        if len(self._messages) >= MESSAGES_MAX:
            self._is_cut = True
            self._messages.clear()
            message = GivenUp("the follower is too slow")
        self._messages.append(message)
        self._told.set()

    def request_over(self) -> None:
        """The request has ended, one way or the other."""
        if not self._is_over:
            self.tell(GivenUp("the request ended without an answer"))

    async def messages(self) -> AsyncIterator[AnyMessage]:
        """What there is to tell, from the beginning; without an end."""
        while True:
            if not self._messages:
                self._told.clear()
                try:
                    async with asyncio.timeout(ALIVE_S):
                        await self._told.wait()
                except TimeoutError:
                    yield Alive()
            while self._messages:
                yield self._messages.popleft()


class HandoverBook:
    """All hand-overs of one worker."""

    def __init__(self, namespace: Namespace, loop: asyncio.AbstractEventLoop) -> None:
        self._namespace = namespace
        self._loop = loop
        self._by_id: dict[str, Outgoing] = {}
        self._by_key: dict[BlockKey, tuple[Outgoing, ...]] = {}
        """Read by the engine's thread too: values are replaced, never changed."""
        self._awaited: dict[str, asyncio.Event] = {}
        self._put_numbers = itertools.count()

    def open(self, request_id: str, keys: Sequence[BlockKey]) -> Outgoing:
        """From now on saves of these blocks tell of themselves. Raises Overloaded."""
        if len(self._by_id) >= HANDOVERS_MAX or request_id in self._by_id:
            raise Overloaded(f"{len(self._by_id)} requests are being handed over already, or this one is")
        handover = self._by_id[request_id] = Outgoing(request_id, keys)
        for key in keys:
            self._by_key[key] = (*self._by_key.get(key, ()), handover)
        if request_id in self._awaited:
            self._awaited[request_id].set()
        return handover

    def request_over(self, handover: Outgoing) -> None:
        """The request has ended; its hand-over is kept for a follower that has not come yet."""
        handover.request_over()
        if not handover.is_followed:
            self._loop.call_later(UNFOLLOWED_S_MAX, self._close_unfollowed, handover)

    def close(self, handover: Outgoing) -> None:
        """Nobody follows any more. Safe to repeat."""
        if self._by_id.get(handover.request_id) is not handover:
            return
        del self._by_id[handover.request_id]
        for key in handover.keys:
            left = tuple(other for other in self._by_key.get(key, ()) if other is not handover)
            if left:
                self._by_key[key] = left
            else:
                self._by_key.pop(key, None)

    async def follow(self, request_id: str) -> Outgoing:
        """The hand-over, which is the caller's to close. Raises UnknownHandover."""
        if request_id not in self._by_id:
            await self._arrival(request_id)
        handover = self._by_id.get(request_id)
        if handover is None or handover.is_followed:
            raise UnknownHandover("no such request is being handed over here")
        handover.is_followed = True
        return handover

    async def _arrival(self, request_id: str) -> None:
        if len(self._awaited) >= HANDOVERS_MAX:
            raise Overloaded(f"{HANDOVERS_MAX} requests are being waited for already")
        arrived = self._awaited.setdefault(request_id, asyncio.Event())
        try:
            async with asyncio.timeout(KNOWN_S_MAX):
                await arrived.wait()
        except TimeoutError:
            raise UnknownHandover("no such request is being handed over here") from None
        finally:
            self._awaited.pop(request_id, None)

    def _close_unfollowed(self, handover: Outgoing) -> None:
        if not handover.is_followed:
            self.close(handover)

    def listener(self, keys: Sequence[BlockKey]) -> SaveListener | None:
        """Who is to be told of a save of these blocks. From any thread."""
        found = {id(handover): handover for key in keys for handover in self._by_key.get(key, ())}
        if not found:
            return None
        return _Announcer(next(self._put_numbers), self._namespace, self._loop, list(found.values()))


class _Announcer:
    """Carries what one save tells from its thread to the hand-overs (a SaveListener)."""

    def __init__(
        self, put: int, namespace: Namespace, loop: asyncio.AbstractEventLoop, handovers: Sequence[Outgoing]
    ) -> None:
        self._put = put
        self._namespace = namespace
        self._loop = loop
        self._handovers = handovers

    def placed(self, segment: Segment, keys: Sequence[BlockKey], extents: Sequence[Extent]) -> None:
        self._tell(Placed(self._put, self._namespace, segment, pack_keys(keys), list(extents)))

    def written(self, layers: Sequence[int], checksums: bytes) -> None:
        self._tell(Written(self._put, list(layers), checksums))

    def _tell(self, message: AnyMessage) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tell_all, message)

    def _tell_all(self, message: AnyMessage) -> None:
        for handover in self._handovers:
            handover.tell(message)
