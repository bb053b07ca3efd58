"""Bytes of KV events → values: the format that vLLM publishes, in its newer (maps) and older (arrays) spelling. No I/O.

A message is [topic, sequence number, batch]: 8 bytes big-endian, then msgpack of [time, events, data-parallel rank].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from dbnode.scheduler.index import TAIL_BYTES, KeyTail, Medium

END_OF_REPLAY = (1 << 64) - 1
"""Sequence number of the message that ends a replay."""

_MEDIA = {"GPU": Medium.DEVICE, "CPU": Medium.HOST, "STORAGE": Medium.STORAGE}
_TAIL_MASK = (1 << 8 * TAIL_BYTES) - 1
_WHOLE_PREFIX = (None, "full_attention", "mla_attention", "sink_full_attention")
_STORED_FIELDS = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium")
_REMOVED_FIELDS = ("block_hashes", "medium")


class MalformedEvents(Exception):
    """These bytes are no KV events."""


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Consecutive blocks of one prefix are held now."""

    tails: tuple[KeyTail, ...]
    token_ids: Sequence[int]
    block_size: int
    medium: Medium
    is_root: bool
    """Whether the first of them begins a prompt."""
    first_extra: tuple[Any, ...] | None
    """What entered its key besides tokens, without tags; None: nothing."""
    group: int | None
    is_whole_prefix: bool
    """Whether all of the prefix stays held, not only a window."""


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    tails: tuple[KeyTail, ...]
    medium: Medium
    group: int | None


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    pass


KvEvent = BlocksStored | BlocksRemoved | AllBlocksCleared


@dataclass(frozen=True, slots=True)
class EventBatch:
    sequence: int
    at_unix_s: float
    """By the worker's clock: only to be compared with its own."""
    events: tuple[KvEvent, ...]


def read_batch(frames: Sequence[bytes]) -> EventBatch | None:
    """One message, live or replayed (routing frames may stand before it); None ends a replay. Raises MalformedEvents."""
    if len(frames) < 2 or len(frames[-2]) != 8:
        raise MalformedEvents(f"a message of {len(frames)} parts")
    sequence = int.from_bytes(frames[-2], "big")
    if sequence == END_OF_REPLAY:
        return None
    try:
        at_unix_s, events, *_ = msgspec.msgpack.decode(frames[-1], type=list[Any])
        found = tuple(event for raw in events if (event := _event(raw)) is not None)
        return EventBatch(sequence, float(at_unix_s), found)
    except (msgspec.DecodeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise MalformedEvents(f"a batch that cannot be read: {error}") from error


def _event(raw: Any) -> KvEvent | None:
    """None: of a kind that is not known, as newer versions may send."""
    kind = raw["type"] if isinstance(raw, Mapping) else raw[0]
    match kind:
        case "BlockStored":
            return _stored(_fields(raw, _STORED_FIELDS))
        case "BlockRemoved":
            return _removed(_fields(raw, _REMOVED_FIELDS))
        case "AllBlocksCleared":
            return AllBlocksCleared()
    return None


def _fields(raw: Any, names: Sequence[str]) -> Mapping[str, Any]:
    return raw if isinstance(raw, Mapping) else dict(zip(names, raw[1:], strict=False))


def _stored(fields: Mapping[str, Any]) -> BlocksStored | None:
    medium = _medium(fields)
    if medium is None:
        return None
    extras = fields.get("extra_keys")
    first_extra = extras[0] if extras else None
    token_ids, block_size = fields["token_ids"], fields["block_size"]
    if not isinstance(token_ids, list) or not isinstance(block_size, int) or block_size < 1:
        raise TypeError("token_ids and block_size")
    return BlocksStored(
        tails=_tails(fields["block_hashes"]),
        token_ids=token_ids,
        block_size=block_size,
        medium=medium,
        is_root=fields["parent_block_hash"] is None,
        first_extra=tuple(first_extra) if first_extra else None,
        group=fields.get("group_idx"),
        is_whole_prefix=fields.get("kv_cache_spec_kind") in _WHOLE_PREFIX,
    )


def _removed(fields: Mapping[str, Any]) -> BlocksRemoved | None:
    medium = _medium(fields)
    return None if medium is None else BlocksRemoved(_tails(fields["block_hashes"]), medium, fields.get("group_idx"))


def _medium(fields: Mapping[str, Any]) -> Medium | None:
    """Without one it is device memory; None: somewhere this node knows nothing of."""
    name = fields.get("medium")
    return Medium.DEVICE if name is None else _MEDIA.get(name)


def _tails(hashes: Any) -> tuple[KeyTail, ...]:
    """Hashes come whole or as their low 64 bits."""
    return tuple(
        KeyTail(item[-TAIL_BYTES:] if isinstance(item, bytes) else (item & _TAIL_MASK).to_bytes(TAIL_BYTES, "big"))
        for item in hashes
    )
