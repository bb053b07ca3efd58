"""Keys of a request's blocks: vLLM's own prefix hashes where they are the pool's keys, else the same computed here.

They are the same if vLLM hashes with `sha256_cbor`, from its default seed, in blocks of the pool's size. Cache salt, LoRA and
multimodal inputs enter either way, by vLLM's own rules.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

from stratakv.keys import NONE_HASH, BlockKey, chained_key
from stratakv.log import EventLogger

log = EventLogger("stratakv.vllm.keys")

SAME_ALGORITHM = "sha256_cbor"


class RequestKeys:
    """Keys of the full blocks of requests; those that are computed here are kept until the request is forgotten."""

    def __init__(self, block_size: int, hash_block_size: int | None, algorithm: str) -> None:
        self._block_size = block_size
        self._computed: dict[str, list[BlockKey]] = {}
        seed_is_default = os.environ.get("PYTHONHASHSEED") is None
        self.are_vllms = algorithm == SAME_ALGORITHM and seed_is_default and hash_block_size in (None, block_size)
        if not self.are_vllms:
            log.info(
                "keys_computed",
                reason=f"vLLM hashes by {algorithm}" if algorithm != SAME_ALGORITHM else "vLLM's seed or blocks differ",
                hint=f"--prefix-caching-hash-algo {SAME_ALGORITHM} and no PYTHONHASHSEED save that work",
            )

    def of(self, request: Any) -> Sequence[BlockKey]:
        """Of all tokens that are known by now."""
        if self.are_vllms:
            hashes: Sequence[BlockKey] = request.block_hashes
            return hashes
        keys = self._computed.setdefault(request.request_id, [])
        size = self._block_size
        for end in range((len(keys) + 1) * size, request.num_tokens + 1, size):
            extra, _ = generate_block_hash_extra_keys(request, end - size, end, 0)
            parent = keys[-1] if keys else NONE_HASH
            keys.append(chained_key(parent, request.all_token_ids[end - size : end], extra))
        return keys

    def forget(self, request_id: str) -> None:
        """The request is finished."""
        self._computed.pop(request_id, None)
