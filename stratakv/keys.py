"""Prefix keys of blocks, and the namespaces that scope them.

A block is `block_size` consecutive tokens. Its key is a SHA-256 over (parent key, tokens, extra keys) in canonical CBOR, so
it names the whole prefix up to the block's end. The bytes equal vLLM's `sha256_cbor` prefix hashes, so that engine events
and router indexes need no translation. Called by workers, the DB node and the engine integrations; keeps nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NewType

import cbor2

BlockKey = NewType("BlockKey", bytes)
"""32 bytes."""
Namespace = NewType("Namespace", bytes)
"""16 bytes."""
ExtraKey = tuple[str | int, ...]

KEY_BYTES = 32
NAMESPACE_BYTES = 16


NUMBERS_MAX = 65_536
"""Token ids whose encoding is remembered."""


def _cbor(value: object) -> bytes:
    return cbor2.dumps(value, canonical=True)


class _Numbers(dict[int, bytes]):
    """Token ids as they are encoded: a block has many, and most come again."""

    def __missing__(self, token_id: int) -> bytes:
        encoded = _cbor(token_id)
        if len(self) < NUMBERS_MAX:
            self[token_id] = encoded
        return encoded


_numbers = _Numbers()
_KEY_HEAD = _cbor((bytes(KEY_BYTES), 0, 0))[: -KEY_BYTES - 2]
"""What a parent, tokens and extra keys begin with."""
_NO_EXTRA = _cbor(None)
NONE_HASH = BlockKey(hashlib.sha256(_cbor("vllm-none-hash")).digest())
"""The parent of the first block (vLLM with PYTHONHASHSEED unset and `sha256_cbor`)."""


def chained_key(parent: BlockKey, token_ids: Sequence[int], extra: tuple[object, ...] | None) -> BlockKey:
    """The key of one full block behind `parent`; `extra` are vLLM's tagged tuples that concern it."""
    return _key(parent, _tokens_head(len(token_ids)), token_ids, _cbor(extra))


@functools.lru_cache(maxsize=16)
def _tokens_head(num_tokens: int) -> bytes:
    """What so many tokens begin with."""
    encoded = _cbor((0,) * num_tokens)
    return encoded[: len(encoded) - num_tokens]


def _key(parent: BlockKey, head: bytes, token_ids: Iterable[int], tail: bytes) -> BlockKey:
    """Of a block whose tokens begin with `head` and are followed by `tail`, as canonical CBOR has it."""
    encoded = b"".join((_KEY_HEAD, parent, head, *map(_numbers.__getitem__, token_ids), tail))
    return BlockKey(hashlib.sha256(encoded).digest())


def block_keys(
    token_ids: Sequence[int],
    block_size: int,
    *,
    first_block_extra: tuple[ExtraKey, ...] | None = None,
    parent: BlockKey = NONE_HASH,
) -> list[BlockKey]:
    """Chained keys of the full blocks of `token_ids`; a trailing partial block has none.

    `first_block_extra` are vLLM's tagged tuples, e.g. `(("cache_salt", "t1"),)`; they enter the first block only.
    """
    keys: list[BlockKey] = []
    head = _tokens_head(block_size)
    tail = _NO_EXTRA if first_block_extra is None else _cbor(first_block_extra)
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = _key(parent, head, token_ids[start : start + block_size], tail)
        keys.append(parent)
        tail = _NO_EXTRA
    return keys


def salt_extra(cache_salt: str | None) -> tuple[ExtraKey, ...] | None:
    """`first_block_extra` of a request with this salt: only requests with the same one share any block."""
    return (("cache_salt", cache_salt),) if cache_salt else None


@dataclass(frozen=True, slots=True)
class NamespaceScope:
    """All that must be equal for one worker's KV bytes to be usable by another."""

    model_revision: str
    tokenizer_digest: str
    dtype: str
    layout_digest: str
    block_size: int
    tenant_salt: str = ""

    def namespace(self) -> Namespace:
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()
        return Namespace(hashlib.sha256(canonical).digest()[:NAMESPACE_BYTES])


def pack_keys(keys: Sequence[BlockKey]) -> bytes:
    """Keys back to back, as they travel and as PostgreSQL stores them."""
    return b"".join(keys)


def unpack_keys(packed: bytes) -> list[BlockKey]:
    """Inverse of `pack_keys`. Raises ValueError if the length is no multiple of 32."""
    if len(packed) % KEY_BYTES:
        raise ValueError(f"{len(packed)} bytes are no whole number of {KEY_BYTES}-byte keys")
    return [BlockKey(packed[i : i + KEY_BYTES]) for i in range(0, len(packed), KEY_BYTES)]
