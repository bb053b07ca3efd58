"""KV events as vLLM 0.32 sends them: bytes that were recorded, and a publisher of them with a replay socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from stratakv.keys import BlockKey, block_keys, salt_extra

RECORDED_TOKENS = list(range(100, 356))
_IDS = b"\xdc\x01\x00" + b"".join(
    bytes([i]) if i < 128 else b"\xcc" + bytes([i]) if i < 256 else b"\xcd" + i.to_bytes(2, "big")
    for i in RECORDED_TOKENS
)
_END = b"\xa9group_idx\x00\xb2kv_cache_spec_kind\xaefull_attention\x00"
RECORDED_STORED = (
    b"\x93\xcbA\xda\xc0\xc9\xad\xa0=\xde\x91\x8b\xa4type\xabBlockStored\xacblock_hashes\x92"
    b"\xcfO0\x9a\tH\xef$\xed\xcft\x90\xf0\xe1I\xc9\x0cH\xb1parent_block_hash\xc0\xa9token_ids"
    + _IDS
    + b"\xaablock_size\xcc\x80\xa7lora_id\xc0\xa6medium\xa3GPU\xa9lora_name\xc0\xaaextra_keys\x92\xc0\xc0"
    + _END
)
"""One prompt of 300 tokens at block_size 128, of vLLM 0.32.0 with sha256_cbor."""
RECORDED_SALTED = (
    b"\x93\xcbA\xda\xc0\xc9\xad\xd2D\xee\x91\x8b\xa4type\xabBlockStored\xacblock_hashes\x92"
    b"\xcf\xf7\xfd\xb7b\xef\x05 \x9b\xcf\x12^\xe3\x1d\xe3\xaa\x82\xec\xb1parent_block_hash\xc0\xa9token_ids"
    + _IDS
    + b"\xaablock_size\xcc\x80\xa7lora_id\xc0\xa6medium\xa3GPU\xa9lora_name\xc0\xaaextra_keys\x92\x91\xa2t1\xc0"
    + _END
)
"""The same with cache_salt t1."""


def low_bits(key: BlockKey) -> int:
    return int.from_bytes(key, "big") & (2**64 - 1)


def stored(
    token_ids: Sequence[int], block_size: int, *, medium: str | None = "GPU", salt: str | None = None, **more: Any
) -> dict[str, Any]:
    """All blocks of one prompt."""
    keys = block_keys(token_ids, block_size, first_block_extra=salt_extra(salt))
    event = {
        "type": "BlockStored",
        "block_hashes": [low_bits(key) for key in keys],
        "parent_block_hash": None,
        "token_ids": list(token_ids[: len(keys) * block_size]),
        "block_size": block_size,
        "lora_id": None,
        "medium": medium,
        "lora_name": None,
        "extra_keys": [(salt,) if salt else None, *[None] * (len(keys) - 1)],
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }
    return event | more


def removed(keys: Sequence[BlockKey], *, medium: str | None = "GPU", **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": [low_bits(key) for key in keys], "medium": medium} | more


def frames(sequence: int, at_unix_s: float, *events: Any) -> list[bytes]:
    return [b"", sequence.to_bytes(8, "big"), msgspec.msgpack.encode([at_unix_s, list(events), 0])]


class Publisher:
    """PUB with a ROUTER that replays, as `--kv-events-config` makes them."""

    def __init__(self) -> None:
        self._context = zmq.asyncio.Context()
        self._pub = self._context.socket(zmq.XPUB)
        self._router = self._context.socket(zmq.ROUTER)
        for socket in (self._pub, self._router):
            socket.setsockopt(zmq.LINGER, 0)
        self.events = f"tcp://127.0.0.1:{self._pub.bind_to_random_port('tcp://127.0.0.1')}"
        self.replay = f"tcp://127.0.0.1:{self._router.bind_to_random_port('tcp://127.0.0.1')}"
        self.sent: list[list[bytes]] = []
        """What the replay remembers."""
        self.next_sequence = 0
        self.clock_s = 1000.0
        self.replays: list[int] = []

    async def subscribed(self) -> None:
        await self._pub.recv()

    async def publish(self, *events: Any, lost: bool = False) -> None:
        """One batch; a lost one reaches the replay's memory only."""
        self.clock_s += 1
        message = frames(self.next_sequence, self.clock_s, *events)
        self.next_sequence += 1
        self.sent.append(message)
        if not lost:
            await self._pub.send_multipart(message)

    def restart(self) -> None:
        self.next_sequence = 0
        self.sent.clear()

    async def answer_replays(self) -> None:
        while True:
            client, _, start = await self._router.recv_multipart()
            self.replays.append(int.from_bytes(start, "big"))
            for message in self.sent:
                if message[1] >= start:
                    await self._router.send_multipart([client, b"", *message])
            await self._router.send_multipart([client, b"", b"", b"\xff" * 8, b""])

    def close(self) -> None:
        self._context.destroy(linger=0)


@asynccontextmanager
async def publishing() -> AsyncIterator[Publisher]:
    publisher = Publisher()
    task = asyncio.create_task(publisher.answer_replays())
    try:
        yield publisher
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        publisher.close()
