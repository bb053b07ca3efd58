"""Tells routers which blocks L1 got and lost, in the form that vLLM publishes: PUB for the events, ROUTER to ask for missed ones.

A batch is [time, events, rank] in MessagePack, numbered from 0 without gaps. Who asks for batches that are no longer remembered, or
from 0, gets one that says all: cleared, then everything that is held, under the number of the last batch it stands for. Blocks
carry no tokens: their keys are those of `stratakv.keys`, of which the low 64 bits are told. Owned by `workers.service`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import zmq

from stratakv.keys import BlockKey
from stratakv.log import EventLogger
from stratakv.pool.auth import PoolCredentials
from stratakv.pool.member_sockets import gatekeeper, listen_on, serve_members
from workers.engine.journal import CHANGES_MAX, BlockJournal
from workers.engine.kv_cache import KVCache

log = EventLogger("workers.kv_events")

INTERVAL_S = 0.05
"""Changes are gathered for so long."""
BATCHES_KEPT = 200
"""For those who missed some; whoever missed more is told everything."""
QUEUED_MAX = 1000
"""Batches waiting for one subscriber that does not read; what comes then is lost for it, which it sees by the numbers."""
REQUEST_BYTES_MAX = 1024
END_OF_REPLAY = b"\xff" * 8
LOW_BITS = (1 << 64) - 1
MEDIUM = "GPU"
"""vLLM's word for device memory, whatever the device."""

_encode = msgspec.msgpack.Encoder().encode


class KvEventPublisher:
    """One worker's events; `run` until cancelled, then `close`."""

    def __init__(
        self,
        cache: KVCache,
        host: str,
        port: int,
        credentials: PoolCredentials | None = None,
        batches_kept: int = BATCHES_KEPT,
        changes_max: int = CHANGES_MAX,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Listens at once, on `port` for events and the next one for replays; 0: any. Raises SetupError."""
        self._cache = cache
        self._wall = wall
        self._journal = cache.journal = BlockJournal(changes_max)
        self._held: set[int] = set()
        """What the batches so far amount to."""
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=batches_kept)
        self._next = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._keeper = gatekeeper(self._context, credentials) if credentials is not None else None
        self._events = self._context.socket(zmq.PUB)
        self._replays = self._context.socket(zmq.ROUTER)
        try:
            self.events_port = self._listen(self._events, host, port, credentials)
            self.replay_port = self._listen(self._replays, host, port and port + 1, credentials)
        except BaseException:
            self.close()
            raise
        self._publish([{"type": "AllBlocksCleared"}])

    async def run(self) -> None:
        """Publish what changes, and answer who missed something, until cancelled."""
        while True:
            self.tell()
            self._answer()
            await asyncio.sleep(INTERVAL_S)

    def close(self) -> None:
        self._cache.journal = None
        self._events.close(linger=0)
        self._replays.close(linger=0)
        if self._keeper is not None:
            self._keeper.stop()
        self._context.term()

    def tell(self) -> None:
        """Publish what has changed since."""
        changes = self._journal.take()
        if changes is None:
            log.warning("kv_events_started_over")
            self._held = {_low_bits(key) for key in self._cache.keys()}  # noqa: SIM118
            self._publish(self._everything())
            return
        events = []
        for is_held, group in itertools.groupby(changes, key=lambda change: change[1]):
            numbers = [_low_bits(key) for key, _ in group]
            events.append(self._stored(numbers) if is_held else _removed(numbers))
            (self._held.update if is_held else self._held.difference_update)(numbers)
        if events:
            self._publish(events)

    def _publish(self, events: list[dict[str, Any]]) -> None:
        payload = _encode([self._wall(), events, 0])
        self._kept.append((self._next, payload))
        try:
            self._events.send_multipart((b"", self._next.to_bytes(8, "big"), payload), zmq.NOBLOCK)
        except zmq.Again:
            log.debug("kv_events_not_sent", sequence=self._next)  # the number tells
        self._next += 1

    def _answer(self) -> None:
        """All that have asked by now."""
        while True:
            try:
                frames = self._replays.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) == 3 and len(frames[2]) == 8:
                self._replay(frames[0], int.from_bytes(frames[2], "big"))

    def _replay(self, client: bytes, start: int) -> None:
        if start > 0 and self._kept[0][0] <= start:
            batches: Iterable[tuple[int, bytes]] = [kept for kept in self._kept if kept[0] >= start]
        else:
            batches = [(self._next - 1, _encode([self._wall(), self._everything(), 0]))]
        try:
            for sequence, payload in batches:
                self._replays.send_multipart((client, b"", b"", sequence.to_bytes(8, "big"), payload), zmq.NOBLOCK)
            self._replays.send_multipart((client, b"", b"", END_OF_REPLAY, b""), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.debug("kv_events_replay_failed", error=str(error))  # it will ask again

    def _everything(self) -> list[dict[str, Any]]:
        return [{"type": "AllBlocksCleared"}, self._stored(list(self._held))]

    def _stored(self, numbers: list[int]) -> dict[str, Any]:
        return {
            "type": "BlockStored",
            "block_hashes": numbers,
            "parent_block_hash": None,
            "token_ids": [],
            "block_size": self._cache.block_size,
            "lora_id": None,
            "medium": MEDIUM,
        }

    def _listen(self, socket: zmq.Socket[bytes], host: str, port: int, credentials: PoolCredentials | None) -> int:
        if credentials is not None:
            serve_members(socket, credentials)
        for option, value in (
            (zmq.SNDHWM, QUEUED_MAX),
            (zmq.RCVHWM, QUEUED_MAX),
            (zmq.MAXMSGSIZE, REQUEST_BYTES_MAX),
        ):
            socket.setsockopt(option, value)
        return listen_on(socket, host, port, "worker.events_port")


def _removed(numbers: list[int]) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": numbers, "medium": MEDIUM}


def _low_bits(key: BlockKey) -> int:
    return int.from_bytes(key[-8:], "big") & LOW_BITS
